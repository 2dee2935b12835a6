"""How the demo's bundled weights were trained and judged. No command of capfilt runs this."""
