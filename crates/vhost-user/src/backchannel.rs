//! What the vhost crate (0.18) lacks: telling the front end that the configuration has changed.
//!
//! Its `Backend` has no such message, and does not give its socket away either. So the message that brings the socket is
//! looked at before the crate reads it, which makes a second descriptor of the same socket.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

/// Bytes of a message's header: request, flags, size of what follows.
pub(crate) const HEADER_BYTES: usize = 12;

/// Protocol version 1, and no reply wanted.
const FLAGS: u32 = 1;

/// The socket for messages to the front end, if that is what the next message on `connection` brings. The message
/// stays to be read.
pub(crate) fn look_for_socket(connection: impl AsFd) -> Result<Option<OwnedFd>, Errno> {
    let mut header = [0; HEADER_BYTES];
    let (count, _) = recv(
        &connection,
        &mut header,
        RecvFlags::PEEK | RecvFlags::DONTWAIT,
    )?;
    let request = header.first_chunk().map(|code| u32::from_ne_bytes(*code));
    if count < HEADER_BYTES || request != Some(FrontendReq::SET_BACKEND_REQ_FD.into()) {
        return Ok(None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(
        &connection,
        &mut [IoSliceMut::new(&mut header)],
        &mut control,
        RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    )?;
    let socket = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(socket)
}

/// Tells the front end that the configuration space has changed. It answers by reading it.
pub(crate) fn send_config_change(socket: &OwnedFd) -> Result<(), Errno> {
    let mut message = [0; HEADER_BYTES];
    message[..4].copy_from_slice(&u32::from(BackendReq::CONFIG_CHANGE_MSG).to_ne_bytes());
    message[4..8].copy_from_slice(&FLAGS.to_ne_bytes());
    // A front end that reads nothing must not stop us; so few bytes go whole or not at all.
    send(socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(|_| ())
}

#[cfg(test)]
mod tests {
    //! Guards the message's bytes, and that looking takes nothing away.
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
    use std::io::{IoSlice, Read};
    use std::os::unix::net::UnixStream;

    fn message(request: u32) -> Vec<u8> {
        [request, 1, 0]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect()
    }

    #[test]
    fn the_socket_is_found_and_the_message_stays() {
        let (front, mut back) = UnixStream::pair().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [ours.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let bytes = message(21);
        sendmsg(
            &front,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();

        let socket = look_for_socket(&back).unwrap().expect("the socket");
        send_config_change(&socket).unwrap();
        let mut received = [0; HEADER_BYTES];
        theirs.read_exact(&mut received).unwrap();
        assert_eq!(received.to_vec(), message(2));
        back.read_exact(&mut received).unwrap();
        assert_eq!(received.to_vec(), bytes);
    }

    #[test]
    fn other_messages_bring_none() {
        let (front, back) = UnixStream::pair().unwrap();
        assert_eq!(look_for_socket(&back).unwrap_err(), Errno::AGAIN);
        rustix::io::write(&front, &message(21)[..11]).unwrap();
        assert!(look_for_socket(&back).unwrap().is_none());
        rustix::io::write(&front, &[0]).unwrap();
        // The right message without a descriptor.
        assert!(look_for_socket(&back).unwrap().is_none());
        let (front, back) = UnixStream::pair().unwrap();
        rustix::io::write(&front, &message(1)).unwrap();
        assert!(look_for_socket(&back).unwrap().is_none());
    }
}
