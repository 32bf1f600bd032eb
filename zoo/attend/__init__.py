"""Parts for the socket `attend`: one file per mechanism."""
