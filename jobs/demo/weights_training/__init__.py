"""How the demo's bundled weights were trained and evaluated. No command of capfilt runs this.

In: scenes of `world/`. Out: the folders of `jobs/demo/weights`, and the shares of true captions that they give.
"""
