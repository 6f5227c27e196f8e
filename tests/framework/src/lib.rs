//! Starts VMMs, daemons and guests for tests, and cleans up after them
