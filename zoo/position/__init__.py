"""Parts for the socket `position`: one file per mechanism."""
