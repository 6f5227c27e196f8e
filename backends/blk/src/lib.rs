//! vhost-user block device daemon over io_uring
