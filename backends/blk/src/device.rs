//! The disk as a virtio device: features and configuration space. Spec: virtio 1.3, 5.2.3, 5.2.4.
//!
//! Configuration is answered on the control thread; the only thing the driver can change, the
//! write cache setting, reaches the queue threads through an atomic in [`Shared`]. The only thing
//! the operator can, the size, is in [`resize`].
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use berth_queue_worker::control_socket::Command;
use berth_queue_worker::device::protocol;
use berth_queue_worker::sandbox::syscalls::IO_URING;
use berth_queue_worker::{Device, QueueStart, RateLimit, RateLimiter, SessionHandle, Syscall};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};

use crate::engine::{EngineChoice, FixedBuffers, Plan};
use crate::image::Disk;
use crate::image::raw::{BLKDISCARD, BLKGETSIZE64};
use crate::request::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR_SIZE};
use crate::resize::{self, Frontend};
use crate::worker::BlkWorker;

/// Most queues a disk may have.
pub const MAX_QUEUES: u16 = 16;
/// Largest ring.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Bytes of a serial (virtio 1.3, 5.2.6.1).
pub const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Most bytes of one segment.
const SIZE_MAX: u32 = 4 << 20;
/// Most segments of one request, below what the smallest common ring holds beside header and
/// status.
const SEG_MAX: u32 = 126;
/// Where `writeback` lies in the configuration space.
const WCE_OFFSET: u32 = 32;
/// Bytes of the configuration space up to and including the write-zeroes fields.
const CONFIG_SIZE: usize = 60;

/// What the queues have in common.
#[derive(Debug)]
pub struct Shared {
    disk: Disk,
    serial: [u8; SERIAL_LEN],
    engine: Plan,
    /// The driver's choice, if it negotiated CONFIG_WCE: true for write-back. One writer, the
    /// control thread; a request that is taken at the same moment may see either value.
    write_cache: AtomicBool,
    limiter: Option<Arc<RateLimiter>>,
    /// Transfers on registered buffers; counted only where there may be some.
    fixed_transfers: Option<AtomicU64>,
}

impl Shared {
    /// The image.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The serial, padded with zeros.
    pub fn serial(&self) -> &[u8; SERIAL_LEN] {
        &self.serial
    }

    /// What does the I/O.
    pub fn engine(&self) -> &Plan {
        &self.engine
    }

    /// What all queues together are held to.
    pub fn limiter(&self) -> Option<&Arc<RateLimiter>> {
        self.limiter.as_ref()
    }

    /// Counts transfers on registered buffers: once a batch, as all queues share the counter.
    pub fn count_fixed(&self, transfers: u64) {
        if let Some(total) = &self.fixed_transfers {
            total.fetch_add(transfers, Ordering::Relaxed);
        }
    }

    /// Whether a write may complete before it is durable.
    pub fn write_cache_enabled(&self) -> bool {
        self.write_cache.load(Ordering::Relaxed)
    }
}

/// How a disk is offered.
#[derive(Clone, Copy, Debug)]
pub struct BlkConfig {
    /// The serial, padded with zeros.
    pub serial: [u8; SERIAL_LEN],
    /// Number of virtqueues.
    pub num_queues: u16,
    /// Largest ring, a power of two.
    pub queue_size: u16,
    /// What does the I/O.
    pub engine: EngineChoice,
    /// Whether guest memory is registered with it.
    pub fixed_buffers: FixedBuffers,
    /// What all queues together are held to.
    pub rate_limit: Option<RateLimit>,
}

/// A virtio block device on one image.
#[derive(Debug)]
pub struct BlkDevice {
    shared: Arc<Shared>,
    num_queues: u16,
    queue_size: u16,
    frontend: Frontend,
}

impl BlkDevice {
    /// A device on `disk`.
    pub fn new(disk: Disk, config: &BlkConfig) -> Self {
        let engine = Plan::new(&disk, config.engine, config.fixed_buffers);
        BlkDevice {
            shared: Arc::new(Shared {
                disk,
                serial: config.serial,
                engine,
                write_cache: AtomicBool::new(true),
                limiter: config
                    .rate_limit
                    .as_ref()
                    .map(RateLimiter::new)
                    .map(Arc::new),
                fixed_transfers: (config.fixed_buffers != FixedBuffers::Off)
                    .then(AtomicU64::default),
            }),
            num_queues: config.num_queues,
            queue_size: config.queue_size,
            frontend: Frontend::default(),
        }
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn set_write_cache(&self, on: bool) {
        self.shared.write_cache.store(on, Ordering::Relaxed);
    }
}

impl Device for BlkDevice {
    const NAME: &'static str = "blk";
    const RELOADS: bool = true;
    type Worker = BlkWorker;

    fn features(&self) -> u64 {
        let mut bits = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_CONFIG_WCE
            | 1 << VIRTIO_BLK_F_MQ;
        if self.shared.disk.read_only() {
            return bits | 1 << VIRTIO_BLK_F_RO;
        }
        if self.shared.disk.blocks().discard.is_some() {
            bits |= 1 << VIRTIO_BLK_F_DISCARD;
        }
        bits | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn protocol_features(&self) -> u64 {
        if self.shared.engine.fixed_buffers {
            protocol::PINS_MEMORY
        } else {
            0
        }
    }

    fn syscalls(&self) -> Vec<Syscall> {
        // What SyncEngine does with the image, what a discard of a block device falls back to, the
        // size of one that may have grown, and locks that come and go with the session.
        const IMAGE: &[Syscall] = &[
            Syscall::any(libc::SYS_preadv),
            Syscall::any(libc::SYS_pwritev2),
            // musl's pwritev2 without flags.
            #[cfg(target_env = "musl")]
            Syscall::any(libc::SYS_pwritev),
            Syscall::any(libc::SYS_fdatasync),
            Syscall::any(libc::SYS_fallocate),
            Syscall::ioctl(&[BLKDISCARD as u32, BLKGETSIZE64 as u32]),
            Syscall::fcntl(&[libc::F_OFD_SETLK as u32, libc::F_OFD_GETLK as u32]),
        ];
        [&IO_URING[..], IMAGE].concat()
    }

    fn metrics(&self) -> String {
        let Some(total) = &self.shared.fixed_transfers else {
            return String::new();
        };
        let total = total.load(Ordering::Relaxed);
        format!(
            "# HELP berth_fixed_transfers_total Reads and writes begun on registered buffers.\n\
             # TYPE berth_fixed_transfers_total counter\n\
             berth_fixed_transfers_total{{device=\"blk\"}} {total}\n"
        )
    }

    fn num_queues(&self) -> u16 {
        self.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    fn config(&self) -> Vec<u8> {
        let disk = &self.shared.disk;
        let blocks = disk.blocks();
        let in_blocks = |bytes: u32| bytes / blocks.logical.max(1);
        let exponent = in_blocks(blocks.physical).max(1).ilog2() as u8;
        let alignment = u8::try_from(in_blocks(blocks.alignment_offset)).unwrap_or(0);
        let min_io = u16::try_from(in_blocks(blocks.min_io)).unwrap_or(0).max(1);
        let discard_unit = blocks.discard.unwrap_or(0) / SECTOR_SIZE as u32;
        let mut config = Config::default();
        config.put(0, &disk.capacity_sectors().to_le_bytes());
        config.put(8, &SIZE_MAX.to_le_bytes());
        let seg_max = SEG_MAX.min(u32::from(self.queue_size.saturating_sub(2)).max(1));
        config.put(12, &seg_max.to_le_bytes());
        config.put(20, &blocks.logical.to_le_bytes());
        // Topology: physical block exponent, alignment offset, minimal and optimal I/O size.
        config.put(24, &[exponent, alignment]);
        config.put(26, &min_io.to_le_bytes());
        config.put(28, &in_blocks(blocks.opt_io).to_le_bytes());
        config.put(32, &[u8::from(self.shared.write_cache_enabled())]);
        config.put(34, &self.num_queues.to_le_bytes());
        config.put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        config.put(40, &(MAX_RANGES as u32).to_le_bytes());
        config.put(44, &discard_unit.max(1).to_le_bytes());
        config.put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        config.put(52, &(MAX_RANGES as u32).to_le_bytes());
        config.put(56, &[1]);
        config.0.to_vec()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        match (offset, data) {
            (WCE_OFFSET, [value @ (0 | 1)]) => {
                self.set_write_cache(*value == 1);
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn new_worker(&self, start: &QueueStart) -> io::Result<BlkWorker> {
        BlkWorker::new(Arc::clone(&self.shared), start)
    }

    fn session_started(&self, handle: SessionHandle) {
        self.frontend.set(Some(handle));
    }

    fn session_ended(&self) {
        self.frontend.set(None);
        self.set_write_cache(true);
    }

    fn reset(&self) {
        self.set_write_cache(true);
    }

    fn reload(&self) {
        resize::on_signal(&self.shared.disk, &self.frontend);
    }

    fn commands(&self) -> &'static [Command] {
        &resize::COMMANDS
    }

    fn command(&self, name: &str) -> Result<String, String> {
        debug_assert_eq!(name, "resize", "the only command there is");
        resize::resize(&self.shared.disk, &self.frontend)
    }

    fn status(&self) -> String {
        let disk = &self.shared.disk;
        let on_off = |on| if on { "on" } else { "off" };
        format!(
            "image={:?} sectors={} usable_sectors={} read_only={} write_cache={}",
            disk.path(),
            disk.capacity_sectors(),
            disk.usable_sectors(),
            on_off(disk.read_only()),
            on_off(self.shared.write_cache_enabled()),
        )
    }
}

/// The bytes of `struct virtio_blk_config`, little-endian.
struct Config([u8; CONFIG_SIZE]);

impl Default for Config {
    fn default() -> Config {
        Config([0; CONFIG_SIZE])
    }
}

impl Config {
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}
