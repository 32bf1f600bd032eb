"""Parts for the socket `normalize`: one file per mechanism."""
