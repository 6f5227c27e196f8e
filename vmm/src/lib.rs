//! One KVM guest in one process; its disks and network cards are vhost-user daemons
