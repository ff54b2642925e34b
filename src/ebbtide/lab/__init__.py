"""The laboratory: experiments over the library's public face, and their reports.

Everything here imports only what a user could import. Pictures, data sets and storage engines
are imported inside the functions that need them, so that `ebbtide --help` stays quick.
"""
