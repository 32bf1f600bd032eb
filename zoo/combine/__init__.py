"""Parts for the socket `combine`: one file per mechanism."""
