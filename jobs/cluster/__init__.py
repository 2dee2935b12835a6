"""Everything that knows Ray: the session, the actors of the stages, jobs sent to a cluster, training on one."""
