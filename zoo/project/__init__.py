"""Parts for the socket `project`: one file per mechanism."""
