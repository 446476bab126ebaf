"""The demo with its embedded images and teacher."""
