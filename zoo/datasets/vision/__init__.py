"""Images and sets: drawn, embedded, from files and from the hub."""
