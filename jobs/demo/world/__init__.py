"""The demo's world: scenes, their images, captions whose truth can be checked, and the web that serves them."""
