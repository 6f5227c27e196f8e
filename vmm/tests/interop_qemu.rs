//! The frontend drives the vhost-user disk of QEMU's storage daemon, written in C by others, with rings
//! in memory that no guest has ever run in. Skipped where `qemu-storage-daemon` is not installed.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod ring;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_vmm::config::{DiskConfig, Dma, Link, MemoryConfig, VhostUserConfig};
use berth_vmm::devices::virtio::device::{
    Activation, ResetProgress, TransportNotify, VirtioDevice,
};
use berth_vmm::memory::GuestRam;
use berth_vmm::vhost_user::{Frontends, Kind, SessionState};
use ring::{Buffer, Ring};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(1);
const SECTORS: u64 = 2048;
/// Request types and the status of success (virtio 1.3, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;

struct Silent;

impl TransportNotify for Silent {
    fn config_changed(&self) {}

    fn needs_reset(&self) {
        panic!("the device needs a reset");
    }
}

/// QEMU's storage daemon; killed when it is dropped.
struct Daemon(Child);

impl Daemon {
    fn start(image: &Path, socket: &Path) -> Option<Self> {
        let file = format!("driver=file,node-name=disk,filename={}", image.display());
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
            socket.display()
        );
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &file, "--export", &export])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        child.ok().map(Self)
    }

    fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(
            Command::new("kill")
                .args([name, &pid])
                .status()
                .unwrap()
                .success()
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Bench {
    _dir: TempDir,
    image: PathBuf,
    socket: PathBuf,
    ram: GuestRam,
    frontends: Frontends,
    device: Box<dyn VirtioDevice>,
}

fn bench() -> Bench {
    let dir = TempDir::new().unwrap();
    let (image, socket) = (dir.as_path().join("disk.img"), dir.as_path().join("sock"));
    File::create(&image)
        .unwrap()
        .set_len(SECTORS * 512)
        .unwrap();
    let ram = GuestRam::new(&MemoryConfig::of(4 << 20)).unwrap();
    let mut frontends = Frontends::with_operation_limit(LIMIT).unwrap();
    let disk = DiskConfig {
        id: "_disk0".to_owned(),
        backend: VhostUserConfig {
            link: Link::Connect(socket.clone()),
            num_queues: 2,
            queue_size: 64,
            dma: Dma::Auto,
        },
        readonly: false,
    };
    let mut device = frontends.connect(Kind::Blk(disk)).unwrap();
    device.attach(Arc::new(Silent));
    Bench {
        _dir: dir,
        image,
        socket,
        ram,
        frontends,
        device,
    }
}

impl Bench {
    /// The device runs two rings, with requests next to them.
    fn activate(&mut self) -> [Disk; 2] {
        let rings = [0x10_0000, 0x20_0000].map(|base| Disk {
            ring: Ring::new(self.ram.memory(), base, 64),
            requests: base + Ring::LEN,
        });
        // The ring here knows nothing of EVENT_IDX.
        let features = self.device.features() & !(1 << VIRTIO_RING_F_EVENT_IDX);
        assert!(self.device.accepts(features));
        let activation = Activation {
            features,
            queues: vec![rings[0].ring.setup(0), rings[1].ring.setup(1)],
            memory: self.ram.memory().clone(),
        };
        self.device.activate(activation).unwrap();
        rings
    }

    fn reset(&mut self) -> Duration {
        let begin = Instant::now();
        self.device.reset();
        while self.device.reset_progress() == ResetProgress::Pending {
            assert!(begin.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
        begin.elapsed()
    }

    fn wait_for(&self, state: SessionState) {
        let begin = Instant::now();
        while self.frontends.sessions()[0].state != state {
            assert!(begin.elapsed() < PATIENCE, "never {state:?}");
            std::thread::yield_now();
        }
    }
}

/// A ring of the disk, and one request: header, 512 bytes of data, status.
struct Disk {
    ring: Ring,
    requests: u64,
}

impl Disk {
    fn request(&mut self, kind: u32, sector: u64, data: Option<&mut [u8; 512]>) {
        let (header, buffer, status) =
            (self.requests, self.requests + 0x200, self.requests + 0x400);
        let memory = self.ring.memory.clone();
        memory.write_obj([kind, 0], GuestAddress(header)).unwrap();
        memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
        memory.write_obj(0xff_u8, GuestAddress(status)).unwrap();
        let piece = |gpa, len, writable| Buffer { gpa, len, writable };
        let mut chain = vec![piece(header, 16, false)];
        if let Some(data) = &data {
            memory.write_slice(&data[..], GuestAddress(buffer)).unwrap();
            chain.push(piece(buffer, 512, kind == IN));
        }
        chain.push(piece(status, 1, true));
        self.ring.submit(&chain);
        self.ring.complete();
        let answer: u8 = memory.read_obj(GuestAddress(status)).unwrap();
        assert_eq!(answer, OK);
        if let Some(data) = data {
            memory.read_slice(data, GuestAddress(buffer)).unwrap();
        }
    }

    /// Writes a sector through the ring, and reads it back through it.
    fn round_trip(&mut self, sector: u64, byte: u8) {
        self.request(OUT, sector, Some(&mut [byte; 512]));
        let mut read = [0; 512];
        self.request(IN, sector, Some(&mut read));
        assert_eq!(read, [byte; 512]);
    }
}

#[test]
fn qemus_disk_is_read_written_killed_and_stopped() {
    let mut bench = bench();
    let Some(mut daemon) = Daemon::start(&bench.image, &bench.socket) else {
        eprintln!("skipped: no qemu-storage-daemon");
        return;
    };
    assert!(bench.frontends.wait_settled(PATIENCE));
    let mut capacity = [0; 8];
    bench.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    let [mut first, mut second] = bench.activate();
    for i in 0..100 {
        first.round_trip(i, i as u8 + 1);
        second.round_trip(200 + i, i as u8 + 2);
    }

    // Killed while idle: the next one goes on with the same rings.
    daemon.signal("-KILL");
    daemon.0.wait().unwrap();
    bench.wait_for(SessionState::Waiting);
    daemon = Daemon::start(&bench.image, &bench.socket).unwrap();
    first.round_trip(101, 0xaa);
    second.round_trip(301, 0xbb);
    second.request(FLUSH, 0, None);
    let mut sector = [0; 512];
    let image = File::open(&bench.image).unwrap();
    image.read_exact_at(&mut sector, 301 * 512).unwrap();
    assert_eq!(sector, [0xbb; 512]);

    // A driver that starts over.
    assert!(bench.reset() < PATIENCE);
    let [mut first, _] = bench.activate();
    first.round_trip(7, 0x77);

    // Stopped in the middle of a reset, or of what is left of the start, whose time began a little
    // earlier: over at the deadline; served again when it goes on.
    daemon.signal("-STOP");
    let took = bench.reset();
    assert!(took >= LIMIT / 2 && took < LIMIT * 5, "{took:?}");
    daemon.signal("-CONT");
    bench.wait_for(SessionState::Live);
    let [mut first, _] = bench.activate();
    first.round_trip(8, 0x88);
    assert!(bench.frontends.stop(PATIENCE).is_empty());
}
