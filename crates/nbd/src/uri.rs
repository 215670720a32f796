//! How clients name an export: URIs as the NBD project defines them.

use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt;

use urus_listen::Address;

/// The NBD URI of an export at this address; None where there is none. An address that stands for all of the host's is given
/// as `localhost`. With `tls` it says that TLS is needed.
pub(crate) fn uri(address: &Address, export: &str, tls: bool) -> Option<String> {
    let nbd = if tls { "nbds" } else { "nbd" };
    let export = escape(export.as_bytes());
    match address {
        Address::Unix(path) => {
            // The client may run in another directory.
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let path = escape(path.as_os_str().as_bytes());
            Some(format!("{nbd}+unix:///{export}?socket={path}"))
        }
        Address::Tcp(address) => {
            let host = match address.ip() {
                ip if ip.is_unspecified() => "localhost".into(),
                IpAddr::V4(ip) => ip.to_string(),
                IpAddr::V6(ip) => format!("[{ip}]"),
            };
            Some(match address.port() {
                10809 => format!("{nbd}://{host}/{export}"),
                port => format!("{nbd}://{host}:{port}/{export}"),
            })
        }
        _ => None,
    }
}

/// Percent-encodes what a URI cannot carry as it is.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"/._-~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    //! Guards the URIs that users paste.
    use super::*;

    #[test]
    fn uris_are_as_the_nbd_project_defines_them() {
        let unix = Address::Unix("/run/my disk.sock".into());
        assert_eq!(
            uri(&unix, "", false).unwrap(),
            "nbd+unix:///?socket=/run/my%20disk.sock"
        );
        assert_eq!(
            uri(&unix, "a?b", true).unwrap(),
            "nbds+unix:///a%3Fb?socket=/run/my%20disk.sock"
        );
        for (address, expected) in [
            ("127.0.0.1:10809", "nbd://127.0.0.1/disk"),
            ("127.0.0.1:1234", "nbd://127.0.0.1:1234/disk"),
            ("[::1]:1234", "nbd://[::1]:1234/disk"),
            ("0.0.0.0:1234", "nbd://localhost:1234/disk"),
        ] {
            let address = Address::Tcp(address.parse().unwrap());
            assert_eq!(uri(&address, "disk", false).unwrap(), expected);
        }
        assert_eq!(uri(&Address::Unnamed, "", false), None);
    }
}
