"""Marks: verdicts of people on samples, from the command or the page to the shards whose selection obeys them.

In: uids, URLs, hosts, sha256 or a list of them. Out: records of marks, and by shard the rules that hold there.

`marking` makes marks and takes them back, `search` finds the shards that hold their samples, `rules` says what holds
for a shard and for a sample; `trained` names the checkpoints that saw what is marked; `from_file` reads lists.
"""
