"""Double descent: the test error over width and over data, with noisy labels."""
