//! vhost-user network device daemon over a tap
