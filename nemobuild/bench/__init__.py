"""Load on a served endpoint: what a user of it waits for, and how much it gives, side by side with another one."""
