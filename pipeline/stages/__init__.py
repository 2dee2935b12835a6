"""The stages of one shard, each a worker that is a plain function call: crawl, caption, rank, filter, selection.

In: a shard's committed inputs. Out: its outputs and one record. Stages do not import each other and know no Ray.
`shard_images` and `img2dataset_shard` are crawl's: images decoded and resized, and folders that img2dataset made.
"""
