"""Rows -> samples. The files are the stages: read, render, prepare (tokenise, mask, pack), cursor."""
