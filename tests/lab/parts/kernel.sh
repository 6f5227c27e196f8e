# shellcheck shell=bash
# Debian's 6.12 cloud kernel: vmlinuz (the bzImage as shipped), vmlinux (the ELF inside it), modules/.
# Sourced by tests/lab/assets.

# The newest 6.12 cloud kernel that the machine's Debian sources offer.
kernel_package() {
    apt-cache "${APT[@]}" search --names-only '^linux-image-6\.12\.[0-9].*-cloud-amd64$' |
        cut -d' ' -f1 | sort -V | tail -n 1
}

build_kernel() {
    local package deb=$WORK/deb
    refresh_lists
    package=$(kernel_package)
    [ -n "$package" ] || die "no linux-image-6.12.*-cloud-amd64 in $SOURCES"
    mkdir -p "$deb"
    step "fetching $package"
    (cd "$WORK" && apt-get "${APT[@]}" -qq -o APT::Sandbox::User=root download "$package")
    dpkg-deb -x "$WORK/$package"_*.deb "$deb"
    rm "$WORK/$package"_*.deb
    mv "$deb"/boot/vmlinuz-* "$WORK/vmlinuz"
    unpack_vmlinux "$WORK/vmlinuz" "$WORK/vmlinux"
    # depmod wants the modules below ROOT/lib/modules; newer packages have them below usr/lib.
    [ -d "$deb/lib/modules" ] || { mkdir -p "$deb/lib" && mv "$deb/usr/lib/modules" "$deb/lib/"; }
    ls "$deb/lib/modules" >"$WORK/kernel-version"
    depmod -b "$deb" "$(cat "$WORK/kernel-version")"
    mv "$deb/lib/modules" "$WORK/modules"
    rm -rf "$deb"
}

# Little-endian unsigned number of $3 bytes at offset $2 of file $1.
number_at() { od -An -v -t "u$3" -j "$2" -N "$3" --endian=little "$1" | tr -d ' '; }

# unpack_vmlinux BZIMAGE VMLINUX: Linux's x86 boot protocol: setup_sects at 0x1f1, the compressed
# payload's offset and length at 0x248 and 0x24c; its last 4 bytes are the unpacked size, which only
# gzip has as a part of its format.
unpack_vmlinux() {
    local sectors offset length magic unpack
    sectors=$(number_at "$1" $((0x1f1)) 1)
    offset=$(($(number_at "$1" $((0x248)) 4) + (sectors + 1) * 512))
    length=$(($(number_at "$1" $((0x24c)) 4) - 4))
    magic=$(od -An -v -t x1 -j "$offset" -N 4 "$1" | tr -d ' ')
    case $magic in
        28b52ffd) unpack=(zstd -dcq) ;;
        fd377a58) unpack=(xz -dc --single-stream) ;;
        1f8b*) unpack=(gzip -dc) length=$((length + 4)) ;;
        *) die "kernel payload of an unknown kind: $magic" ;;
    esac
    dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count="$length" status=none |
        "${unpack[@]}" >"$2" || die "cannot unpack $1"
    [ "$(head -c 4 "$2" | tail -c 3)" = ELF ] || die "no ELF inside $1"
}
