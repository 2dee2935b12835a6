"""Sources whose pictures lie in files: folders of images, WebDataset tars, Hugging Face tables, lists of paths.

In: the ``input`` and ``format`` of a source. Out, for the intake: rows as from a list, where each picture's URL is
its place (``imagefolder:pets/cats/1.jpg``). Out, for the crawl: the bytes of a place, as a fetch from the web would
give them. Nothing is copied before the crawl reads it, and nothing outside the source's own folders is opened.

`places` names and confines the files; `folder`, `tars` and `tables` read one format each; `formats` chooses among
them; `fetch` gives the crawl the bytes.
"""
