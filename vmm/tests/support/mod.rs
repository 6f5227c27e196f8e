//! Starts the real binary, with micro-guests for kernels.
#![allow(dead_code, reason = "each test binary uses its part")]
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot start its process has failed"
)]

pub(crate) mod daemons;
pub(crate) mod slot;
pub(crate) mod virtio;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

/// Longer than any wait of these tests takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The binary under test.
pub(crate) fn vmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-vmm"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_remove("RUST_LOG");
    command
}

/// Runs the binary to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    vmm().args(args).output().unwrap()
}

/// Whether this machine has a KVM that opens; says so where it has not.
pub(crate) fn has_kvm() -> bool {
    let has = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !has {
        eprintln!("skipped: no /dev/kvm");
    }
    has
}

/// Looks again and again until `what` gives something; panics when it never does.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// 32-bit code that a micro-guest is made of.
#[derive(Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Writes a text to COM1 with one string instruction.
    pub(crate) fn print(mut self, text: &str) -> Self {
        let len = text.len() as u32;
        // call over the text, which leaves its address on the stack of registers: esi.
        self.0.extend([0xbc, 0x00, 0x00, 0x20, 0x00]); // mov esp, 0x200000
        self.0.push(0xe8); // call
        self.0.extend(len.to_le_bytes());
        self.0.extend(text.as_bytes());
        self.0.push(0x5e); // pop esi
        self.0.push(0xb9); // mov ecx, len
        self.0.extend(len.to_le_bytes());
        self.0.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
        self.0.extend([0xf3, 0x6e]); // rep outsb
        self
    }

    /// Writes a byte to a port.
    pub(crate) fn out8(mut self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xba, low, high]); // mov dx, port
        self.0.extend([0xb0, value]); // mov al, value
        self.0.push(0xee); // out dx, al
        self
    }

    /// Writes 32 bits to an address.
    pub(crate) fn store32(mut self, gpa: u32, value: u32) -> Self {
        self.0.extend([0xc7, 0x05]); // mov dword ptr [gpa], value
        self.0.extend(gpa.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Writes a word to a port.
    pub(crate) fn out16(mut self, port: u16, value: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xba, low, high]); // mov dx, port
        let [low, high] = value.to_le_bytes();
        self.0.extend([0x66, 0xb8, low, high]); // mov ax, value
        self.0.extend([0x66, 0xef]); // out dx, ax
        self
    }

    /// Writes a word to a register of a PCI function, by the ports.
    pub(crate) fn pci_write(self, (bus, device): (u8, u8), register: u8, value: u16) -> Self {
        let port = 0xcfc + u16::from(register & 2);
        self.pci_address(bus, device, register).out16(port, value)
    }

    /// Reads a word of a PCI function, by the ports, until the bits of `mask` are `value`.
    pub(crate) fn pci_wait(
        mut self,
        (bus, device): (u8, u8),
        register: u8,
        mask: u16,
        value: u16,
    ) -> Self {
        let start = self.0.len();
        self = self.pci_address(bus, device, register);
        let [low, high] = (0xcfc + u16::from(register & 2)).to_le_bytes();
        self.0.extend([0x66, 0xba, low, high]); // mov dx, port
        self.0.extend([0x66, 0xed]); // in ax, dx
        let [low, high] = mask.to_le_bytes();
        self.0.extend([0x66, 0x25, low, high]); // and ax, mask
        let [low, high] = value.to_le_bytes();
        self.0.extend([0x66, 0x3d, low, high]); // cmp ax, value
        self.0.extend([0x0f, 0x85]); // jne to the start
        let back = start as i32 - (self.0.len() as i32 + 4);
        self.0.extend(back.to_le_bytes());
        self
    }

    fn pci_address(mut self, bus: u8, device: u8, register: u8) -> Self {
        let address =
            1 << 31 | u32::from(bus) << 16 | u32::from(device) << 11 | u32::from(register & 0xfc);
        self.0.extend([0x66, 0xba, 0xf8, 0x0c]); // mov dx, 0xcf8
        self.0.push(0xb8); // mov eax, address
        self.0.extend(address.to_le_bytes());
        self.0.push(0xef); // out dx, eax
        self
    }

    /// Powers the machine off by ACPI.
    pub(crate) fn power_off(self) -> Self {
        self.out16(0x604, 1 << 13 | 5 << 10).halt()
    }

    /// Stops for good.
    pub(crate) fn halt(mut self) -> Self {
        self.0.extend([0xf4, 0xeb, 0xfd]); // hlt; jmp to it
        self
    }

    /// Runs everything so far again, for ever.
    pub(crate) fn again(mut self) -> Self {
        self.0.push(0xe9); // jmp
        let back = -(self.0.len() as i32 + 4);
        self.0.extend(back.to_le_bytes());
        self
    }

    /// Sends back every byte that comes in at COM1, for ever.
    pub(crate) fn echo(mut self) -> Self {
        self.0.extend([0x66, 0xba, 0xfd, 0x03]); // mov dx, 0x3fd
        self.0.extend([0xec, 0xa8, 0x01]); // in al, dx; test al, 1
        self.0.extend([0x74, 0xfb]); // jz to the in
        self.0.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
        self.0.extend([0xec, 0xee]); // in al, dx; out dx, al
        self.0.extend([0xeb, 0xef]); // jmp to the start
        self
    }

    /// Meets an exception without an IDT, and without one for that, and dies.
    pub(crate) fn triple_fault(mut self) -> Self {
        self.0.extend([0x6a, 0x00, 0x6a, 0x00]); // push 0; push 0
        self.0.extend([0x0f, 0x01, 0x1c, 0x24]); // lidt [esp]
        self.0.extend([0x0f, 0x0b]); // ud2
        self
    }

    /// It as machine code, which runs at any address.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Machine code as it is.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// A flat multiboot image with this code, its header's addresses saying that it starts at `load`.
    pub(crate) fn multiboot(&self, load: u32) -> Vec<u8> {
        const FLAGS: u32 = 1 << 16;
        const MAGIC: u32 = 0x1bad_b002;
        let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
        let entry = load + 32;
        let words = [MAGIC, FLAGS, checksum, load, load, 0, 0, entry];
        let mut image: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        image.extend(&self.0);
        image
    }

    /// An ELF kernel that PVH enters at this code, at 1 MiB.
    pub(crate) fn elf(&self) -> Vec<u8> {
        const LOAD_AT: u64 = 0x10_0000;
        const CODE_AT: u64 = 0x1000;
        let note = note(LOAD_AT as u32);
        let mut elf = Vec::new();
        elf.extend(b"\x7fELF\x02\x01\x01");
        elf.resize(16, 0);
        elf.extend(2u16.to_le_bytes()); // ET_EXEC
        elf.extend(62u16.to_le_bytes()); // EM_X86_64
        elf.extend(1u32.to_le_bytes());
        for word in [LOAD_AT, 64, 0] {
            elf.extend(word.to_le_bytes()); // entry, program headers, section headers
        }
        elf.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 2, 0, 0, 0] {
            elf.extend(half.to_le_bytes()); // sizes and counts
        }
        let len = self.0.len() as u64;
        program_header(&mut elf, 1, CODE_AT, LOAD_AT, len);
        program_header(&mut elf, 4, 0x200, 0, note.len() as u64);
        elf.resize(0x200, 0);
        elf.extend(note);
        elf.resize(CODE_AT as usize, 0);
        elf.extend(&self.0);
        elf
    }
}

fn program_header(elf: &mut Vec<u8>, kind: u32, offset: u64, address: u64, len: u64) {
    elf.extend(kind.to_le_bytes());
    elf.extend(7u32.to_le_bytes());
    for word in [offset, address, address, len, len, 4] {
        elf.extend(word.to_le_bytes());
    }
}

/// XEN_ELFNOTE_PHYS32_ENTRY.
fn note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

/// A running VMM with a micro-guest, its serial port in a file and an API socket.
pub(crate) struct Guest {
    child: Child,
    dir: TempDir,
}

impl Guest {
    /// Starts the guest.
    pub(crate) fn start(code: &Code) -> Self {
        Self::start_with(code, &[])
    }

    /// Starts the guest with more arguments.
    pub(crate) fn start_with(code: &Code, args: &[&str]) -> Self {
        Self::start_image(&code.elf(), args)
    }

    /// The same, entered by 32-bit code whatever its memory is like.
    pub(crate) fn start_pvh(code: &Code, args: &[&str]) -> Self {
        Self::start_entered(&code.elf(), ",entry=pvh", args)
    }

    /// Starts a guest of this kernel image.
    pub(crate) fn start_image(image: &[u8], args: &[&str]) -> Self {
        Self::start_entered(image, "", args)
    }

    fn start_entered(image: &[u8], entry: &str, args: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.as_path().join(name).display().to_string();
        std::fs::write(at("kernel"), image).unwrap();
        let sized = args.iter().any(|arg| arg.starts_with("--memory"));
        let memory: &[&str] = if sized {
            &[]
        } else {
            &["--memory", "size=32M"]
        };
        let child = vmm()
            .args(["--kernel", &format!("{}{entry}", at("kernel"))])
            .args(memory)
            .args(["--serial", &format!("file={}", at("serial"))])
            .args(["--api-socket", &format!("path={}", at("api"))])
            .args(args)
            .spawn()
            .unwrap();
        Self { child, dir }
    }

    /// Starts a VMM without a guest; a kernel of that code is there for one.
    pub(crate) fn none(code: &Code) -> Self {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.as_path().join(name).display().to_string();
        std::fs::write(at("kernel"), code.elf()).unwrap();
        let child = vmm()
            .args(["--api-socket", &format!("path={}", at("api"))])
            .spawn()
            .unwrap();
        Self { child, dir }
    }

    /// A path in the guest's own folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.as_path().join(name)
    }

    /// What the guest has written so far.
    pub(crate) fn serial(&self) -> String {
        std::fs::read_to_string(self.path("serial")).unwrap_or_default()
    }

    /// The whole lines of it: the guest may be in the middle of one.
    pub(crate) fn lines(&self) -> Vec<String> {
        let text = self.serial();
        let whole = text.split_inclusive('\n');
        whole
            .filter_map(|line| line.strip_suffix('\n'))
            .map(str::to_owned)
            .collect()
    }

    /// Process id of the VMM.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for the VMM to end; its exit code and standard error.
    pub(crate) fn wait(mut self) -> (i32, String) {
        self.ended()
    }

    /// Waits for the VMM to end; what the guest wrote stays.
    pub(crate) fn ended(&mut self) -> (i32, String) {
        let status = eventually("the VMM ends", || self.child.try_wait().unwrap());
        let mut stderr = String::new();
        let mut pipe = self.child.stderr.take().unwrap();
        pipe.read_to_string(&mut stderr).unwrap();
        (status.code().unwrap_or(-1), stderr)
    }

    /// One request to the API: status and body.
    pub(crate) fn api(&self, method: &str, name: &str) -> (u16, String) {
        let path = self.path("api");
        let stream = eventually("the API listens", || UnixStream::connect(&path).ok());
        ask(stream, method, name)
    }

    /// One request with a body.
    pub(crate) fn put(&self, name: &str, body: &str) -> (u16, String) {
        let path = self.path("api");
        let stream = eventually("the API listens", || UnixStream::connect(&path).ok());
        ask_with(stream, "PUT", name, body)
    }

    /// `vm.info`'s state.
    pub(crate) fn state(&self) -> String {
        let (_, body) = self.api("GET", "vm.info");
        let info: serde_json::Value = serde_json::from_str(&body).unwrap();
        info["state"].as_str().unwrap().to_owned()
    }

    /// One counter of `vm.counters`.
    pub(crate) fn counter(&self, group: &str, name: &str) -> Option<u64> {
        let (_, body) = self.api("GET", "vm.counters");
        let counters: serde_json::Value = serde_json::from_str(&body).unwrap();
        counters[group][name].as_u64()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One request on that connection: status and body.
pub(crate) fn ask(stream: UnixStream, method: &str, name: &str) -> (u16, String) {
    ask_with(stream, method, name, "")
}

/// The same with a body.
pub(crate) fn ask_with(
    mut stream: UnixStream,
    method: &str,
    name: &str,
    body: &str,
) -> (u16, String) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!(
        "{method} /api/v1/{name} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.get(9..12).and_then(|code| code.parse().ok());
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    (status.unwrap_or(0), body.to_owned())
}

/// Whether nothing is at a path.
pub(crate) fn is_absent(path: &Path) -> bool {
    !path.exists()
}
