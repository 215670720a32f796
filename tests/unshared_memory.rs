//! A virtual machine whose memory is not shared with the daemon: its requests are never seen, and QEMU says nothing. Guards the
//! message that says what is wrong, with a real QEMU whose firmware looks for something to boot.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use urus_tests::program::poll;
use urus_tests::served::Serve;
use urus_tests::{Driver, MIB, Scratch, qemu};

/// Ended when it is dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn machine(scratch: &Scratch, share: &str) -> Machine {
    let memory = scratch.file(share);
    let object = format!(
        "memory-backend-file,id=mem,size=128M,mem-path={},share={share}",
        memory.display()
    );
    let socket = scratch.file("vhost");
    let qemu = Command::new("qemu-system-x86_64")
        .args("-M q35,memory-backend=mem -accel tcg -m 128 -display none -serial none".split(' '))
        .args("-monitor none -no-reboot -object".split(' '))
        .arg(object)
        .arg("-chardev")
        .arg(format!("socket,id=c,path={}", socket.display()))
        .args("-device vhost-user-blk-pci,chardev=c,num-queues=1".split(' '))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Machine(qemu.expect("qemu-system-x86_64"))
}

#[test]
fn memory_that_is_not_shared_is_told_of() {
    let scratch = Scratch::new();
    let image = scratch.file("disk.qcow2");
    qemu::create(&image, "", 16 * MIB);
    let served = Serve::new(&image, Driver::alternating(0))
        .arg("--vhost-user")
        .arg(scratch.file("vhost").display().to_string())
        .start();
    let told = || served.log().contains("is probably not shared");
    // With shared memory the firmware reads the disk, and nothing is told.
    let shared = machine(&scratch, "on");
    let wrongly = poll(Duration::from_secs(8), || told().then_some(()));
    assert!(wrongly.is_none(), "{}", served.log());
    drop(shared);
    let unshared = machine(&scratch, "off");
    let warned = poll(Duration::from_secs(60), || told().then_some(()));
    assert!(warned.is_some(), "{}", served.log());
    assert!(
        served.log().contains("memory-backend-memfd"),
        "{}",
        served.log()
    );
    drop(unshared);
    let _ = served.stop();
}
