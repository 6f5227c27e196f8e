//! The main thread's epoll loop.
