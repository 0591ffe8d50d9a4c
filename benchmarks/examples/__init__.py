"""Complete training loops on several devices: each file is one way, and runs by itself."""
