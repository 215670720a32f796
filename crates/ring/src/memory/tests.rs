//! Guards the bounds arithmetic of scattered views and the uniqueness that makes `Buffer` `Send`.
use super::*;

/// A foreign buffer of three separate pieces over heap memory that the keep-alive owns.
fn scattered(lengths: &[usize]) -> Buffer {
    struct Pieces(Vec<Box<[std::cell::UnsafeCell<u8>]>>);
    // SAFETY: the test uses the bytes from one thread at a time.
    unsafe impl Send for Pieces {}
    // SAFETY: as above.
    unsafe impl Sync for Pieces {}
    let pieces = lengths
        .iter()
        .map(|&len| (0..len).map(|_| std::cell::UnsafeCell::new(0)).collect())
        .collect::<Vec<_>>();
    let owner = Arc::new(Pieces(pieces));
    let segments = owner
        .0
        .iter()
        .map(|piece| {
            (
                NonNull::new(piece.as_ptr() as *mut u8).unwrap(),
                piece.len(),
            )
        })
        .collect::<Vec<_>>();
    // SAFETY: the pieces live in `owner`, which is the keep-alive.
    unsafe { Buffer::from_segments(owner, &segments) }
}

#[test]
fn buffers_are_aligned_zeroed_and_send() {
    fn is_send<T: Send>(_: &T) {}
    for bytes in [0, 1, 511, 4096, 3 << 20] {
        let buffer = Buffer::new(bytes);
        is_send(&buffer);
        assert_eq!(buffer.len(), bytes);
        assert!(buffer.as_slice().iter().all(|&byte| byte == 0));
        assert_eq!(buffer.as_slice().as_ptr().addr() % BUFFER_ALIGNMENT, 0);
    }
    assert_eq!(Buffer::from_vec(vec![1, 2, 3]).as_slice(), [1, 2, 3]);
}

#[test]
fn a_buffer_comes_back_only_from_its_last_whole_view() {
    let memory = Buffer::new(100).into_memory();
    let part = memory.slice(10, 20);
    part.write(0, &[7; 20]);
    let memory = memory.try_into_buffer().unwrap_err();
    let part = part.try_into_buffer().unwrap_err();
    drop(part);
    let buffer = memory.try_into_buffer().unwrap();
    let buffer = std::thread::spawn(move || buffer).join().unwrap();
    assert_eq!(buffer.as_slice()[9..11], [0, 7]);
    let chain = RingMemory::chain(vec![RingMemory::new(1), RingMemory::new(1)]);
    assert!(chain.try_into_buffer().is_err());
}

#[test]
fn scattered_views_agree_with_a_flat_model() {
    let lengths = [3, 0, 1, 700, 64];
    let total: usize = lengths.iter().sum();
    let memory = scattered(&lengths).into_memory();
    assert_eq!(memory.len(), total);
    let mut model = (0..total)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect::<Vec<_>>();
    memory.write(0, &model);
    for start in [0, 1, 2, 3, 4, 5, 300, 703, 704, 705, total] {
        for len in [0, 1, 2, 5, 64, 300, 701] {
            if start + len > total {
                continue;
            }
            let view = memory.slice(start, len);
            let mut bytes = vec![0; len];
            view.read(0, &mut bytes);
            assert_eq!(bytes, model[start..start + len]);
            assert_eq!(view.pieces().map(|(_, len)| len).sum::<usize>(), len);
            assert_eq!(view.contiguous().is_some(), view.pieces().count() <= 1);
        }
    }
    memory.zero(2, 4);
    model[2..6].fill(0);
    let mut bytes = vec![0; total];
    memory.read(0, &mut bytes);
    assert_eq!(bytes, model);
    assert!(memory.slice(2, 4).is_zero());
    assert!(!memory.slice(1, 4).is_zero());
    assert!(!memory.slice(2, 5).is_zero());
}

#[test]
fn zeroes_are_found_at_every_length_and_position() {
    for len in [0, 1, 15, 16, 17, 127, 128, 143, 144, 145, 1024, 1025, 4096] {
        for memory in [
            RingMemory::new(len),
            scattered(&[len / 3, len - len / 3]).into_memory(),
        ] {
            assert!(memory.is_zero());
            for position in [
                0,
                1,
                8,
                15,
                16,
                100,
                143,
                144,
                1023,
                1024,
                len.saturating_sub(1),
            ] {
                if position < len {
                    memory.write(position, &[1]);
                    assert!(!memory.is_zero(), "{position} of {len}");
                    memory.zero(position, 1);
                }
            }
        }
    }
}

#[test]
fn chains_join_neighbours_and_keep_memory_alive() {
    let memory = RingMemory::new(8192);
    let joined = RingMemory::chain(vec![memory.slice(0, 512), memory.slice(512, 512)]);
    assert_eq!(joined.contiguous().map(|(_, len)| len), Some(1024));
    assert!(joined.is_aligned(512));
    let apart = RingMemory::chain(vec![memory.slice(4096, 512), RingMemory::new(100)]);
    drop(memory);
    assert!(!apart.is_aligned(512) && apart.is_aligned(4));
    assert_eq!(apart.len(), 612);
    apart.write(500, &[9; 100]);
    assert!(apart.slice(0, 500).is_zero() && apart.slice(600, 12).is_zero());
    assert!(RingMemory::chain(Vec::new()).is_empty());
}

#[test]
#[should_panic(expected = "out of bounds")]
fn ranges_are_checked() {
    let _ = RingMemory::new(10).slice(1, 10);
}

#[test]
fn segments_can_be_replaced() {
    let mut buffer = scattered(&[10, 10]);
    let other = Arc::new(std::sync::Mutex::new([5_u8; 16]));
    let base = NonNull::from(&mut *other.lock().unwrap()).cast();
    // SAFETY: `other` keeps the array alive and nobody locks it meanwhile.
    unsafe { buffer.set_segments(other, &[(base, 16)]) };
    assert!(!buffer.is_owned());
    let mut bytes = [0; 16];
    buffer.copy_to(0, &mut bytes);
    assert_eq!(bytes, [5; 16]);
}
