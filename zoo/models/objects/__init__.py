"""Models that find objects: slots from images, videos and sets."""
