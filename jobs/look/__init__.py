"""``capfilt look``: a corpus as a page, served on this machine or written as one file.

In: a corpus. Out: HTML; of the corpus it adds marks alone. `view` is the state that an address holds, `questions` the
SQL of everything that is shown, `snapshot` answers it, `overview`, `grid`, `selection` and `unmark` say what a page
shows, `page` makes HTML of it; `server` and `file` bring it to a browser.
"""
