"""The demo's world: scenes, their images, captions whose truth can be checked, and the site that serves them.

In: a seed. Out: scenes, pixels, alt texts, and an HTTP server on loopback that also fails as real sites do.
"""
