"""Parts for the socket `score`: one file per mechanism."""
