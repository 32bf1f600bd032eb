"""Parts for the socket `select`: one file per mechanism."""
