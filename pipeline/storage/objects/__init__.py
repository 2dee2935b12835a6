"""Files in a bucket or container of S3, GCS or Azure.

In: a URL and this machine's credentials. Out: whole objects, listings, and an object that is read as a file.

`stores` finds credentials and opens buckets, `files` is what a corpus asks of them, `reader` reads an object as a file.
"""
