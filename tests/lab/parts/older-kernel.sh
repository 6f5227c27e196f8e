# shellcheck shell=bash
# older-kernel/: bookworm's own 6.1 cloud kernel as shipped (its payload is LZ4), and the initramfs with its modules. Where the machine's
# Debian has none, the file 'absent' says so. Sourced by tests/lab/assets, after kernel.sh and initramfs.sh.

# Prints the name of the newest 6.1 cloud kernel that the machine's Debian sources offer.
older_kernel_package() {
    apt-cache "${APT[@]}" search --names-only '^linux-image-6\.1\.[0-9].*-cloud-amd64$' |
        cut -d' ' -f1 | sort -V | tail -n 1
}

build_older-kernel() {
    local package deb=$WORK/deb to=$WORK/older-kernel version
    mkdir -p "$deb/root" "$to"
    refresh_lists
    package=$(older_kernel_package)
    if [ -z "$package" ]; then
        printf "Debian's 6.1 cloud kernel is not in %s" "$SUITE" >"$to/absent"
        rm -r "$deb"
        return
    fi
    step "fetching $package"
    (cd "$deb" && apt-get "${APT[@]}" -qq -o APT::Sandbox::User=root download "$package")
    dpkg-deb -x "$deb/$package"_*.deb "$deb/root"
    cp "$deb"/root/boot/vmlinuz-* "$to/vmlinuz"
    version=$(ls "$deb/root/lib/modules")
    depmod -b "$deb/root" "$version"
    # PCI is a module there.
    pack_initramfs "$deb/root/lib/modules/$version" "$to/guest-initramfs.cpio" virtio_pci "${GUEST_MODULES[@]}"
    printf '%s\n' "$version" >"$to/kernel-version"
    rm -rf "$deb"
}
