"""The student, the methods and the frozen teachers as one module, and the run that trains them."""
