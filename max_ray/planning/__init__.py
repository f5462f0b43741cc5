"""From settings to a plan, before anything is loaded: encoding, task, memory, and what to change. No torch."""
