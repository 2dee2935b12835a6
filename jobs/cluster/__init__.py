"""Everything that knows Ray: the session, the actors of the stages, jobs sent to a cluster, training on one.

In: a config and the shards of a plan, or a training. Out: committed shards, the ranks' outcomes, a job's log and exit
code. `executor` does with Ray what `jobs/local.py` does in this process.
"""
