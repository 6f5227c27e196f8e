//! How each VMM is told to run the same guest. Whatever is not said here is the program's own default.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde_json::json;

/// Who runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// berth-vmm, which starts berth-blk and berth-net itself.
    Berth,
    /// QEMU's q35 with its own virtio-blk, and vhost-net.
    Q35,
    /// The same with qemu-storage-daemon for the disk.
    Q35Daemon,
    /// Cloud Hypervisor with its own devices.
    CloudHypervisor,
    /// Firecracker with its own devices.
    Firecracker,
}

/// What the guest is made of.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u64,
    /// A raw image.
    pub(crate) disk: PathBuf,
    /// A tap that is there.
    pub(crate) tap: String,
    pub(crate) mac: String,
    /// Whether the host has /dev/vhost-net.
    pub(crate) vhost_net: bool,
}

/// The same words for all.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check printk.time=1";

impl Kind {
    /// Runs `shape`; the serial line is standard input and output. `folder` is the machine's own, `daemon` the
    /// socket of its disk's daemon where it does not start one itself.
    pub(crate) fn command(
        self,
        program: &Path,
        shape: &Shape,
        folder: &Path,
        daemon: Option<&Path>,
    ) -> Result<Command> {
        let mut command = Command::new(program);
        match self {
            Kind::Berth | Kind::CloudHypervisor => like_cloud_hypervisor(&mut command, shape),
            Kind::Q35 => {
                qemu(&mut command, shape, "q35,accel=kvm");
                own_disk(&mut command, shape);
            }
            Kind::Q35Daemon => {
                qemu(&mut command, shape, "q35,accel=kvm,memory-backend=ram");
                let memory = shape.memory_mib;
                let ram = format!("memory-backend-memfd,id=ram,size={memory}M,share=on");
                let socket = daemon.unwrap_or(Path::new("")).display().to_string();
                command
                    .args(["-object", &ram])
                    .args(["-chardev", &format!("socket,id=disk,path={socket}")])
                    .args([
                        "-device",
                        "vhost-user-blk-pci,chardev=disk,disable-legacy=on",
                    ]);
            }
            Kind::Firecracker => {
                let config = folder.join("firecracker.json");
                std::fs::write(&config, firecracker(shape).to_string())?;
                command
                    .args(["--no-api", "--enable-pci", "--config-file"])
                    .arg(config);
            }
        }
        Ok(command)
    }
}

fn like_cloud_hypervisor(command: &mut Command, shape: &Shape) {
    command
        .arg("--kernel")
        .arg(&shape.kernel)
        .arg("--initramfs")
        .arg(&shape.initramfs)
        .args(["--cmdline", CMDLINE, "--serial", "tty"])
        .args(["--cpus", &format!("boot={}", shape.cpus)])
        .args(["--memory", &format!("size={}M", shape.memory_mib)])
        .args(["--disk", &format!("path={}", shape.disk.display())])
        .args(["--net", &format!("tap={},mac={}", shape.tap, shape.mac)]);
}

fn qemu(command: &mut Command, shape: &Shape, machine: &str) {
    let vhost = if shape.vhost_net { "on" } else { "off" };
    let Shape { tap, mac, .. } = shape;
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-M", machine, "-cpu", "host"])
        .args(["-smp", &shape.cpus.to_string()])
        .args(["-m", &format!("{}M", shape.memory_mib)])
        .arg("-kernel")
        .arg(&shape.kernel)
        .arg("-initrd")
        .arg(&shape.initramfs)
        .args(["-append", CMDLINE])
        .args([
            "-chardev",
            "stdio,id=serial,signal=off",
            "-serial",
            "chardev:serial",
        ])
        .args([
            "-netdev",
            &format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost={vhost}"),
        ])
        .args([
            "-device",
            &format!("virtio-net-pci,netdev=net,mac={mac},disable-legacy=on,romfile="),
        ]);
}

fn own_disk(command: &mut Command, shape: &Shape) {
    let file = shape.disk.display();
    command
        .args([
            "-drive",
            &format!("if=none,id=disk,format=raw,aio=io_uring,file={file}"),
        ])
        .args(["-device", "virtio-blk-pci,drive=disk,disable-legacy=on"]);
}

/// The disk's daemon of [`Kind::Q35Daemon`].
pub(crate) fn storage_daemon(program: &Path, disk: &Path, socket: &Path) -> Command {
    let mut command = Command::new(program);
    let (disk, socket) = (disk.display(), socket.display());
    command
        .args([
            "--blockdev",
            &format!("driver=file,node-name=disk,aio=io_uring,filename={disk}"),
        ])
        .args([
            "--export",
            &format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}"
            ),
        ]);
    command
}

fn firecracker(shape: &Shape) -> serde_json::Value {
    json!({
        "boot-source": {
            "kernel_image_path": shape.kernel,
            "initrd_path": shape.initramfs,
            "boot_args": CMDLINE,
        },
        "machine-config": { "vcpu_count": shape.cpus, "mem_size_mib": shape.memory_mib },
        "drives": [{
            "drive_id": "disk",
            "path_on_host": shape.disk,
            "is_root_device": false,
            "is_read_only": false,
        }],
        "network-interfaces": [{
            "iface_id": "net",
            "host_dev_name": shape.tap,
            "guest_mac": shape.mac,
        }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_get_the_same_kernel_words_disk_card_and_size() {
        let shape = Shape {
            kernel: "/a/vmlinux".into(),
            initramfs: "/a/initramfs".into(),
            cpus: 3,
            memory_mib: 257,
            disk: "/d.raw".into(),
            tap: "tap9".to_owned(),
            mac: "52:54:00:00:00:09".to_owned(),
            vhost_net: true,
        };
        let folder = std::env::temp_dir().join(format!("berth-perf-fc-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for kind in [
            Kind::Berth,
            Kind::Q35,
            Kind::Q35Daemon,
            Kind::CloudHypervisor,
            Kind::Firecracker,
        ] {
            let daemon = (kind == Kind::Q35Daemon).then_some(Path::new("/d.raw"));
            let command = kind.command(Path::new("/bin/vmm"), &shape, &folder, daemon);
            let mut text = format!("{:?}", command.unwrap());
            if kind == Kind::Firecracker {
                text += &std::fs::read_to_string(folder.join("firecracker.json")).unwrap();
            }
            for part in [
                "/a/vmlinux",
                "/a/initramfs",
                "printk.time=1",
                "3",
                "257",
                "/d.raw",
                "tap9",
                "52:54:00:00:00:09",
            ] {
                assert!(text.contains(part), "{kind:?}: no {part} in {text}");
            }
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
