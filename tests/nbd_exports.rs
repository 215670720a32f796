//! What an NBD export offers beyond reads and writes, as other programs see it: layers of a chain, several exports, TLS, sockets passed
//! by a service manager, a bound on clients, and what a flush on one connection means for the others.
//!
//! Guards against promises in the handshake that only our own client could tell to be empty.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use urus_tests::mounted::Background;
use urus_tests::served::Serve;
use urus_tests::{Driver, MIB, Scratch, Served, content, program, qemu};

const SIZE: u64 = 16 * MIB;

/// Start, length and value of each extent, as nbdinfo prints them.
fn map(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let map = program("nbdinfo")
        .arg(format!("--map={context}"))
        .arg("--json")
        .arg(uri)
        .ok()
        .json();
    let number = |range: &Value, name: &str| range[name].as_u64().expect("a number");
    map.as_array()
        .expect("a list")
        .iter()
        .map(|range| {
            let [start, len, kind] = ["offset", "length", "type"].map(|name| number(range, name));
            (start, len, kind)
        })
        .collect()
}

/// Chains of three layers: the same in both metadata contexts as qemu-nbd's, extent by extent.
#[test]
fn extents_are_those_of_qemu_nbd() {
    for (turn, (base_size, middle_size)) in [(SIZE, SIZE), (SIZE, SIZE / 2), (SIZE / 4, SIZE)]
        .into_iter()
        .enumerate()
    {
        let scratch = Scratch::new();
        let [base, middle, top] =
            ["base.qcow2", "middle.qcow2", "top.qcow2"].map(|name| scratch.file(name));
        qemu::create(&base, "", base_size);
        qemu::io_file(&base, &["write -q -P 1 0 1M", "write -q -P 1 3M 1M"]);
        qemu::create_overlay(&middle, "cluster_size=4k", "base.qcow2", "qcow2");
        let sized = |image: &Path, size: u64| {
            qemu::img("resize -q --shrink")
                .arg(image)
                .arg(size.to_string())
                .ok();
        };
        sized(&middle, middle_size);
        qemu::io_file(
            &middle,
            &[
                "write -q -P 2 512k 100k",
                "write -q -z 3M 512k",
                "write -q -P 2 6M 68k",
            ],
        );
        qemu::create_overlay(&top, "", "middle.qcow2", "qcow2");
        sized(&top, SIZE);
        qemu::io_file(
            &top,
            &[
                "write -q -P 3 256k 64k",
                "write -q -z -u 6M 64k",
                "write -q -P 3 12M 1M",
            ],
        );
        let directory = tempfile::tempdir().expect("a directory for a socket");
        let socket = directory.path().join("qemu");
        let qemu_nbd = program("qemu-nbd")
            .words("--read-only --allocation-depth --persistent --format qcow2 --socket")
            .arg(&socket)
            .arg(&top);
        let reference = Background::start(qemu_nbd, &scratch.file("log"), &socket);
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let contexts = ["base:allocation", "qemu:allocation-depth"];
        let expected = contexts.map(|context| map(&uri, context));
        drop(reference);
        let served = Serve::new(&top, Driver::alternating(turn))
            .with("--read-only")
            .start();
        let found = contexts.map(|context| map(&served.uri(), context));
        served.stop();
        assert_eq!(found, expected, "base {base_size}, middle {middle_size}");
        assert!(found[1].len() > 5, "{found:?}");
    }
}

/// Holes of raw files, as an image and as a backing file: told as qemu-nbd tells them.
#[test]
fn holes_of_raw_files_agree_with_qemu_nbd() {
    let scratch = Scratch::new();
    let (raw, top) = (scratch.file("disk.raw"), scratch.file("top.qcow2"));
    // The last page is not whole.
    let file = std::fs::File::create(&raw).expect("a file");
    file.set_len(SIZE - 1024).expect("a size");
    drop(file);
    qemu::io(
        "raw",
        &raw.display().to_string(),
        &[
            "write -q -P 1 256k 64k",
            "write -q -P 2 1M 300k",
            "write -q -z -u 1100k 64k",
            "write -q -P 3 9M 1M",
        ],
    );
    qemu::create_overlay(&top, "", "disk.raw", "raw");
    qemu::io_file(&top, &["write -q -P 4 512k 640k", "write -q -z 9M 512k"]);
    for (image, format) in [(&raw, "raw"), (&top, "qcow2")] {
        let directory = tempfile::tempdir().expect("a directory for a socket");
        let socket = directory.path().join("qemu");
        let qemu_nbd = program("qemu-nbd")
            .words("--read-only --allocation-depth --persistent --format")
            .arg(format)
            .arg("--socket")
            .arg(&socket)
            .arg(image);
        let reference = Background::start(qemu_nbd, &scratch.file("log"), &socket);
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let contexts = ["base:allocation", "qemu:allocation-depth"];
        let expected = contexts.map(|context| map(&uri, context));
        drop(reference);
        for driver in Driver::ALL {
            let served = Serve::new(image, driver)
                .with(&format!("--read-only --format {format}"))
                .start();
            let found = contexts.map(|context| map(&served.uri(), context));
            served.stop();
            assert_eq!(found, expected, "{format}, {driver:?}");
        }
        assert!(expected[0].len() > 5, "{expected:?}");
    }
}

/// Several images in one process: listed, each under its name, the first also under none, each closed clean.
#[test]
fn several_images_under_names() {
    let scratch = Scratch::new();
    let [one, two] = ["one.qcow2", "two.qcow2"].map(|name| scratch.file(name));
    qemu::create(&one, "", SIZE);
    qemu::create(&two, "cluster_size=4k", 2 * SIZE);
    let served = Serve::new(&one, Driver::IoUring)
        .with("--num-queues 2 --export-name first --image")
        .arg(format!("second={}", two.display()))
        .start();
    let uri = |name: &str| served.uri().replace("///", &format!("///{name}"));
    let list = program("nbdinfo")
        .words("--list --json")
        .arg(served.uri())
        .ok()
        .json();
    let names: Vec<_> = list["exports"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|export| (export["export-name"].clone(), export["export-size"].clone()))
        .collect();
    let expected = [("first", SIZE), ("second", 2 * SIZE)];
    assert_eq!(
        names,
        expected.map(|(name, size)| (name.into(), size.into()))
    );
    qemu::io("raw", &uri("first"), &["write -P 1 1M 64k"]);
    qemu::io("raw", &uri("second"), &["write -P 2 1M 64k"]);
    qemu::io("raw", &uri(""), &["read -P 1 1M 64k"]);
    qemu::io("raw", &uri("second"), &["read -P 2 1M 64k"]);
    let unknown = program("nbdinfo").arg(uri("third")).run();
    assert!(!unknown.status.success(), "{unknown}");
    served.stop();
    for (image, byte) in [(&one, 1), (&two, 2)] {
        qemu::assert_clean(image);
        qemu::io_file(image, &[format!("read -P {byte} 1M 64k")]);
    }
    let _ = Serve::new(&one, Driver::IoUring)
        .with("--export-name x --image")
        .arg(format!("x={}", two.display()))
        .refused()
        .says_one_of(&["two exports have the name"]);
}

/// Certificates under QEMU's names: an authority's, a server's for localhost, a client's.
fn certificates(directory: &Path) {
    let openssl = |arguments: &str| {
        program("openssl")
            .words("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2")
            .words(arguments)
            .current_dir(directory)
            .ok();
    };
    openssl("-keyout ca-key.pem -out ca-cert.pem -subj /CN=authority");
    for (name, subject) in [("server", "/CN=localhost"), ("client", "/CN=client")] {
        openssl(&format!(
            "-CA ca-cert.pem -CAkey ca-key.pem -keyout {name}-key.pem -out {name}-cert.pem -subj {subject} \
             -addext basicConstraints=critical,CA:FALSE -addext subjectAltName=DNS:localhost"
        ));
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

/// A server with TLS on localhost, whose clients need certificates.
struct Tls {
    // The certificates' directory lies here.
    scratch: Scratch,
    served: Served,
    port: u16,
}

impl Tls {
    fn start(image: &Path, driver: Driver) -> Self {
        let scratch = Scratch::new();
        certificates(scratch.path());
        let port = free_port();
        let served = Serve::new(image, driver)
            .with("--num-queues 2 --tls-verify-peer --tls-creds")
            .arg(scratch.path().display().to_string())
            .with(&format!("--nbd localhost:{port}"))
            .start();
        Self {
            scratch,
            served,
            port,
        }
    }

    fn uri(&self) -> String {
        format!(
            "nbds://localhost:{}/?tls-certificates={}",
            self.port,
            self.scratch.path().display()
        )
    }
}

/// libnbd's and QEMU's clients over TLS, with certificates both ways; data as it was, whatever the size of records.
#[test]
fn clients_over_tls() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let [image, source, back] =
            ["image.qcow2", "source", "back"].map(|name| scratch.file(name));
        qemu::create(&image, "", 64 * MIB);
        std::fs::write(&source, content::noise(7, 64 << 20)).expect("writing");
        let tls = Tls::start(&image, driver);
        let info = program("nbdinfo").arg("--json").arg(tls.uri()).ok().json();
        assert_eq!(info["TLS"], true, "{info}");
        assert_eq!(info["exports"][0]["export-size"], 64 * MIB, "{info}");
        let copy = || program("nbdcopy").words("--connections=4 --requests=16 --flush");
        copy().arg(&source).arg(tls.uri()).ok();
        copy().arg(tls.uri()).arg(&back).ok();
        content::assert_same(&source, &back);

        let object = format!(
            "tls-creds-x509,id=tls,endpoint=client,dir={}",
            tls.scratch.path().display()
        );
        let target = format!("driver=nbd,host=localhost,port={},tls-creds=tls", tls.port);
        let compare = qemu::img("compare --object")
            .arg(object)
            .arg("--image-opts");
        compare
            .arg(format!("driver=file,filename={}", source.display()))
            .arg(target)
            .ok();
        let script = format!(
            "h.set_uri_allow_local_file(True)
h.connect_uri('{}')
data = bytes(range(251)) * 4001
for offset in (0, 1, 4095, 65537): h.pwrite(data, offset)
assert h.pread(len(data), 65537) == data
assert h.pread(1, 65536) == data[65536 - 4095:65537 - 4095]
h.shutdown()",
            tls.uri()
        );
        program("nbdsh").arg("-c").arg(script).ok();
        tls.served.stop();
        qemu::assert_clean(&image);
    }
}

/// Who does not ask for TLS, has no certificate, or one of another authority, is not served, and disturbs nobody.
#[test]
fn strangers_are_not_served_over_tls() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    let tls = Tls::start(&image, Driver::IoUring);
    let refused = |uri: &str| {
        let answer = program("nbdinfo").words("--size").arg(uri).run();
        assert!(!answer.status.success(), "{uri}: {answer}");
    };
    let plain = format!("nbd://localhost:{}/", tls.port);
    refused(&plain);
    refused(&tls.served.uri());
    let [others, without] = [Scratch::new(), Scratch::new()];
    certificates(others.path());
    let authority = |to: &Scratch| {
        std::fs::copy(tls.scratch.file("ca-cert.pem"), to.file("ca-cert.pem")).expect("copying");
    };
    authority(&others);
    authority(&without);
    for directory in [&others, &without] {
        let path = directory.path().display();
        refused(&format!(
            "{}?tls-certificates={path}",
            plain.replace("nbd:", "nbds:")
        ));
    }
    // What is no TLS at all, and what is slipped in before it begins.
    for rest in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0x16; 5000],
        &[0x17, 3, 3, 0xff, 0xff],
    ] {
        let mut rude = TcpStream::connect(("localhost", tls.port)).expect("connecting");
        rude.set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a time limit");
        rude.read_exact(&mut [0; 18]).expect("the greeting");
        rude.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0")
            .expect("asking for TLS");
        rude.read_exact(&mut [0; 20]).expect("the answer");
        rude.write_all(rest).expect("writing");
        if rest.len() > 5 {
            let mut answer = Vec::new();
            let _ = rude.read_to_end(&mut answer);
            assert!(answer.len() < 100, "an alert at most: {answer:?}");
        }
    }
    let size = program("nbdinfo").arg("--size").arg(tls.uri()).ok();
    assert_eq!(size.stdout.trim(), SIZE.to_string());
    // The log says whom, and why.
    let log = tls.served.stop();
    for words in ["client=", "it did not ask for TLS", "TLS has failed"] {
        assert!(log.contains(words), "{words}: {log}");
    }

    for (file, say) in [
        ("ca-cert.pem", "authority"),
        ("server-key.pem", "private key"),
    ] {
        let broken = Scratch::new();
        certificates(broken.path());
        std::fs::write(broken.file(file), "nothing").expect("writing");
        let _ = Serve::new(&image, Driver::IoUring)
            .with("--tls-verify-peer --tls-creds")
            .arg(broken.path().display().to_string())
            .refused()
            .says_one_of(&[say]);
    }
}

/// libnbd starts the server as systemd would: with a socket that listens already.
#[test]
fn a_service_manager_can_pass_the_socket() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    let script = format!(
        "h.connect_systemd_socket_activation(['{}', 'serve', '{}'])
h.pwrite(b'passed' * 1000, 1 << 20, nbd.CMD_FLAG_FUA)
assert h.pread(6, 1 << 20) == b'passed'
h.shutdown()",
        urus_tests::program::urus_path().display(),
        image.display()
    );
    program("nbdsh").arg("-c").arg(script).ok();
    assert!(
        !scratch.file("image.qcow2.nbd.sock").exists(),
        "it listens where it was told to, and only there"
    );
    // The client kills the server when it is done.
    let readable = || {
        let read = qemu::io_program("qcow2", &image.display().to_string(), &["read 1M 6k"]);
        read.run().status.success().then_some(())
    };
    assert!(urus_tests::program::poll(Duration::from_secs(20), readable).is_some());
    qemu::assert_no_errors(&image);
}

/// One client more than allowed is turned away; when one goes, the next is served.
#[test]
fn a_bound_on_clients() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    let served = Serve::new(&image, Driver::IoUring)
        .with("--max-connections 2")
        .start();
    let greeted = |mut stream: &UnixStream| stream.read_exact(&mut [0; 18]).is_ok();
    let connect = || {
        let stream = UnixStream::connect(served.socket()).expect("connecting");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a time limit");
        stream
    };
    // The probe that saw the server come up may still have its place.
    let both = urus_tests::program::poll(Duration::from_secs(20), || {
        let both = [connect(), connect()];
        both.iter().all(greeted).then_some(both)
    });
    let [one, _two] = both.expect("two places");
    assert!(!greeted(&connect()), "a third was let in");
    drop(one);
    let place = || greeted(&connect()).then_some(());
    assert!(urus_tests::program::poll(Duration::from_secs(20), place).is_some());
    served.stop();
}

/// As multi-conn promises: what one connection has written and another has flushed survives the server's death.
#[test]
fn a_flush_covers_the_writes_of_other_connections() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::create(&image, "", SIZE);
        let served = Serve::new(&image, driver).with("--num-queues 2").start();
        let client = served.holding(
            "others = [nbd.NBD() for _ in range(3)]
for other in others: other.connect_uri(h.get_uri())
assert all(other.can_multi_conn() for other in others)
for n in range(16): others[n % 2].pwrite(bytes([n + 1]) * 65536, n << 20)
h.zero(32768, 0)
others[2].flush()",
        );
        served.kill();
        client.release();
        qemu::assert_no_errors(&image);
        let mut reads = vec!["read -P 0 0 32k".to_owned(), "read -P 1 32k 32k".to_owned()];
        reads.extend((1..16).map(|n| format!("read -P {} {n}M 64k", n + 1)));
        qemu::io_file(&image, &reads);
    }
}

/// What nbdinfo does not try: fast zeroes, the page cache, zeroes without a hole, and the names of the contexts.
#[test]
fn nbdsh_special_commands() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    let served = Served::start(&image, Driver::IoUring);
    for can in ["cache", "fast-zero", "df", "multi-conn", "structured-reply"] {
        program("nbdinfo")
            .arg("--can")
            .arg(can)
            .arg(served.uri())
            .ok();
    }
    served.nbdsh(
        "import errno
assert h.can_cache() and h.can_fast_zero() and h.can_df()
h.pwrite(b'x' * (1 << 20), 0)
h.cache(1 << 20, 0)
h.zero(131072, 65536, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(131074, 65535) == b'x' + bytes(131072) + b'x'
try: h.zero(1000, 500000, nbd.CMD_FLAG_FAST_ZERO)
except nbd.Error as error: assert error.errnum == errno.ENOTSUP, error
else: raise Exception('it cannot have been fast')
assert h.pread(1000, 500000) == b'x' * 1000
h.zero(65536, 65536 * 4, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
listed = []
both = nbd.NBD()
both.set_opt_mode(True)
both.connect_uri(h.get_uri())
both.opt_list_meta_context(lambda name: listed.append(name))
assert listed == ['base:allocation', 'qemu:allocation-depth'], listed
for name in listed: both.add_meta_context(name)
both.opt_go()
said = {}
both.block_status(4 << 20, 0, lambda name, offset, entries, error: said.setdefault(name, entries))
assert said['qemu:allocation-depth'] == [65536, 1, 131072, 0, 851968, 1, 3 << 20, 0], said
assert sorted(said) == listed, said
both.shutdown()
h.shutdown()",
    );
    served.stop();
    qemu::assert_clean(&image);
}
