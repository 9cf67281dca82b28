"""Tasks, worlds that answer, rewards, and the sandbox that code runs in."""
