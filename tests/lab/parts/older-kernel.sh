# shellcheck shell=bash
# older-kernel/: bookworm's own 6.1 cloud kernel as shipped (its payload is LZ4), and the initramfs with
# its modules. Where it cannot be had, the file 'absent' says so. Sourced by tests/lab/assets, after kernel.sh and initramfs.sh.

# Fetches the newest 6.1 cloud kernel that the machine's Debian sources offer into $1.
fetch_older_kernel() {
    local package
    package=$(apt-cache "${APT[@]}" search --names-only '^linux-image-6\.1\.[0-9].*-cloud-amd64$' |
        cut -d' ' -f1 | sort -V | tail -n 1)
    [ -n "$package" ] || return
    step "fetching $package"
    (cd "$1" && apt-get "${APT[@]}" -qq -o APT::Sandbox::User=root download "$package")
}

build_older-kernel() {
    local deb=$WORK/deb to=$WORK/older-kernel version
    mkdir -p "$deb/root" "$to"
    refresh_lists
    # Lists may be older than the package that they name.
    if ! fetch_older_kernel "$deb" && ! { refresh_lists now && fetch_older_kernel "$deb"; }; then
        printf "Debian's 6.1 cloud kernel cannot be had from %s" "$SUITE" >"$to/absent"
        rm -r "$deb"
        return
    fi
    dpkg-deb -x "$deb"/linux-image-6.1.*.deb "$deb/root"
    cp "$deb"/root/boot/vmlinuz-* "$to/vmlinuz"
    version=$(ls "$deb/root/lib/modules")
    depmod -b "$deb/root" "$version"
    # PCI is a module there.
    pack_initramfs "$deb/root/lib/modules/$version" "$to/guest-initramfs.cpio" virtio_pci "${GUEST_MODULES[@]}"
    printf '%s\n' "$version" >"$to/kernel-version"
    rm -rf "$deb"
}
