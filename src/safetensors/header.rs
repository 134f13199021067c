//! The header of one safetensors file: an 8-byte little-endian length, a JSON table of tensors, then the data.
//!
//! The tensors tile the data section: no holes, no overlaps, no bytes after the last. What the table says in any other
//! order is accepted, and its bytes are kept as they are, so that a mounted file begins with exactly what its author wrote.

use std::collections::HashSet;
use std::fmt;
use std::io::Read;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::SafetensorsError;
use crate::tensor::{Dtype, TensorInfo};

/// The format's limit on the length of the JSON table.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the length field.
const LENGTH_BYTES: usize = 8;

/// Header of one safetensors file, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The file's first bytes: 8-byte little-endian length and JSON, exactly as read.
    pub bytes: Vec<u8>,
    /// The tensors in the order of their data offsets; among equal offsets, those without elements first.
    pub tensors: Vec<TensorInfo>,
    /// `__metadata__`, in the order of the file.
    pub metadata: Vec<(String, String)>,
    /// Length of the data section in bytes.
    pub data_bytes: u64,
}

impl Header {
    /// Checks a header from its exact bytes: the length field and as much JSON as it says.
    ///
    /// # Errors
    /// When the lengths disagree, the JSON is not a table of tensors, a name comes twice, a shape does not give the
    /// length that the offsets give, or the tensors do not tile the data section.
    pub fn parse(bytes: &[u8]) -> Result<Self, SafetensorsError> {
        let json_bytes = json_length(bytes, bytes.len() as u64)?;
        let expected = LENGTH_BYTES as u64 + json_bytes;
        if bytes.len() as u64 != expected {
            let header = bytes.len() as u64;
            return Err(SafetensorsError::FileLength { found: header, expected, header: expected, data: 0 });
        }
        let table: Table = serde_json::from_slice(&bytes[LENGTH_BYTES..])
            .map_err(|source| SafetensorsError::Json { what: "header", source })?;
        let mut tensors = table.tensors;
        tensors.sort_by_key(|tensor| (tensor.offset_bytes, tensor.length_bytes)); // stable: ties stay in the file's order
        let data_bytes = check_tiling(&tensors)?;
        Ok(Self { bytes: bytes.to_vec(), tensors, metadata: table.metadata, data_bytes })
    }

    /// Reads and checks the header of a file of `file_length` bytes, and that header and data fill it exactly.
    ///
    /// # Errors
    /// Those of [`Header::parse`], and when the file is longer or shorter than its header says.
    pub fn read_from(mut read: impl Read, file_length: u64) -> Result<Self, SafetensorsError> {
        if file_length < LENGTH_BYTES as u64 {
            let needed = LENGTH_BYTES as u64;
            return Err(SafetensorsError::Truncated { field: "header length", needed, left: file_length });
        }
        let mut bytes = vec![0; LENGTH_BYTES];
        read.read_exact(&mut bytes)?;
        let json_bytes = json_length(&bytes, file_length)?; // bounds the allocation below by the file's length
        bytes.resize(LENGTH_BYTES + json_bytes as usize, 0);
        read.read_exact(&mut bytes[LENGTH_BYTES..])?;
        let header = Self::parse(&bytes)?;
        if header.file_bytes() != file_length {
            return Err(SafetensorsError::FileLength {
                found: file_length,
                expected: header.file_bytes(),
                header: header.bytes.len() as u64,
                data: header.data_bytes,
            });
        }
        Ok(header)
    }

    /// Length of the whole file in bytes: header and data.
    pub fn file_bytes(&self) -> u64 {
        self.bytes.len() as u64 + self.data_bytes // cannot overflow: check_tiling left room for the longest header
    }
}

/// The length of the JSON, from the first 8 bytes of a file of `file_length` bytes.
fn json_length(bytes: &[u8], file_length: u64) -> Result<u64, SafetensorsError> {
    let Some(field) = bytes.first_chunk::<LENGTH_BYTES>() else {
        let (needed, left) = (LENGTH_BYTES as u64, bytes.len() as u64);
        return Err(SafetensorsError::Truncated { field: "header length", needed, left });
    };
    let length = u64::from_le_bytes(*field);
    if length > MAX_HEADER_BYTES {
        return Err(SafetensorsError::TooLong { field: "header length", length, limit: MAX_HEADER_BYTES });
    }
    let left = file_length - LENGTH_BYTES as u64;
    if length > left {
        return Err(SafetensorsError::Truncated { field: "header", needed: length, left });
    }
    Ok(length)
}

/// Checks that tensors, sorted by offset, follow one another from 0 without holes; returns where the last one ends.
fn check_tiling(tensors: &[TensorInfo]) -> Result<u64, SafetensorsError> {
    let mut end = 0;
    for tensor in tensors {
        let problem = |field, problem| SafetensorsError::Tensor { tensor: tensor.name.clone(), field, problem };
        if tensor.offset_bytes != end {
            let how = if tensor.offset_bytes > end { "hole" } else { "overlap" };
            let begin = tensor.offset_bytes;
            return Err(problem("data_offsets", format!("begins at {begin}, expected {end} ({how})")));
        }
        end = tensor.offset_bytes + tensor.length_bytes; // the sum is the `end` that the file names
    }
    // No file is as long as this; refusing it here keeps every later sum of offsets free of overflow.
    let limit = i64::MAX as u64 - MAX_HEADER_BYTES - LENGTH_BYTES as u64;
    if end > limit {
        return Err(SafetensorsError::TooLong { field: "data section", length: end, limit });
    }
    Ok(end)
}

/// The JSON object as it stands: names checked for duplicates, each tensor checked by itself.
struct Table {
    tensors: Vec<TensorInfo>,
    metadata: Vec<(String, String)>,
}

impl<'de> Deserialize<'de> for Table {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TableVisitor)
    }
}

struct TableVisitor;

impl<'de> Visitor<'de> for TableVisitor {
    type Value = Table;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Table, A::Error> {
        let mut names = HashSet::new();
        let mut table = Table { tensors: Vec::new(), metadata: Vec::new() };
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("`{name}` comes twice, expected each name once")));
            }
            if name == "__metadata__" {
                let metadata: Option<StringMap> = map.next_value().map_err(|error| prefixed(&name, &error))?;
                table.metadata = metadata.map(|StringMap(pairs)| pairs).unwrap_or_default();
                continue;
            }
            let described: Described =
                map.next_value().map_err(|error| prefixed(&format!("tensor `{name}`"), &error))?;
            let tensor = described.check(name).map_err(A::Error::custom)?;
            table.tensors.push(tensor);
        }
        Ok(table)
    }
}

/// An error with the place named in front; serde_json moves line and column to the end.
fn prefixed<E: serde::de::Error>(place: &str, error: &E) -> E {
    E::custom(format!("{place}: {error}"))
}

/// `__metadata__`: strings to strings, each key once.
pub(super) struct StringMap(pub(super) Vec<(String, String)>);

impl<'de> Deserialize<'de> for StringMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = StringMap;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<StringMap, A::Error> {
                let mut keys = HashSet::new();
                let mut pairs = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !keys.insert(key.clone()) {
                        return Err(A::Error::custom(format!("`{key}` comes twice, expected each key once")));
                    }
                    let value = map.next_value().map_err(|error| prefixed(&format!("`{key}`"), &error))?;
                    pairs.push((key, value));
                }
                Ok(StringMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// One tensor as the JSON describes it, not yet checked.
struct Described {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Described {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Described;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object with dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Described, A::Error> {
                let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
                while let Some(field) = map.next_key::<String>()? {
                    match field.as_str() {
                        "dtype" => once(&mut map, &field, &mut dtype)?,
                        "shape" => once(&mut map, &field, &mut shape)?,
                        "data_offsets" => once(&mut map, &field, &mut data_offsets)?,
                        _ => drop(map.next_value::<IgnoredAny>()?), // a later version's field: every reader skips it
                    }
                }
                Ok(Described {
                    dtype: dtype.ok_or_else(|| A::Error::missing_field("dtype"))?,
                    shape: shape.ok_or_else(|| A::Error::missing_field("shape"))?,
                    data_offsets: data_offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?,
                })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Reads a field's value into `slot`, which must be empty.
fn once<'de, A: MapAccess<'de>, T: Deserialize<'de>>(
    map: &mut A,
    field: &str,
    slot: &mut Option<T>,
) -> Result<(), A::Error> {
    if slot.is_some() {
        return Err(A::Error::custom(format!("{field} comes twice, expected once")));
    }
    *slot = Some(map.next_value().map_err(|error| prefixed(field, &error))?);
    Ok(())
}

impl Described {
    /// The checked description: the length that the offsets give is the one that shape and dtype give.
    fn check(self, name: String) -> Result<TensorInfo, SafetensorsError> {
        let problem = |field, problem| SafetensorsError::Tensor { tensor: name.clone(), field, problem };
        let (begin, end) = self.data_offsets;
        let Some(length_bytes) = end.checked_sub(begin) else {
            return Err(problem("data_offsets", format!("ends at {end}, expected at or after its begin {begin}")));
        };
        // Multiplied from the left like every reader does: a zero at the end does not excuse an overflow before it.
        let elements = self.shape.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent));
        let Some(elements) = elements else {
            return Err(problem("shape", format!("{:?}: expected a product below 2^64", self.shape)));
        };
        let dtype = Dtype::from_name(&self.dtype);
        if let Some(bits) = dtype.bits() {
            let Some(bits) = elements.checked_mul(bits) else {
                return Err(problem("shape", format!("{elements} elements of {dtype}: expected below 2^64 bits")));
            };
            if bits % 8 != 0 {
                let problem_text = format!("{elements} elements of {dtype} are {bits} bits, expected whole bytes");
                return Err(problem("shape", problem_text));
            }
            if bits / 8 != length_bytes {
                let expected = bits / 8;
                let shape = &self.shape;
                return Err(problem(
                    "data_offsets",
                    format!("{length_bytes} bytes, expected {expected} for shape {shape:?} of {dtype}"),
                ));
            }
        } else if elements == 0 && length_bytes != 0 {
            let problem_text = format!("{length_bytes} bytes, expected 0 for a tensor without elements");
            return Err(problem("data_offsets", problem_text));
        }
        Ok(TensorInfo { name, dtype, shape: self.shape, offset_bytes: begin, length_bytes })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(json: &str) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes
    }

    fn refusal(json: &str) -> String {
        Header::parse(&file(json)).expect_err(json).to_string()
    }

    #[test]
    fn tensors_come_in_the_order_of_their_data_whatever_the_order_of_the_table() {
        let json = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[2,10]},"__metadata__":{"format":"pt"},
                       "a":{"dtype":"BF16","shape":[],"data_offsets":[0,2]}}  "#;
        let header = Header::parse(&file(json)).unwrap();
        let names: Vec<_> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(header.metadata, [("format".to_owned(), "pt".to_owned())]);
        assert_eq!(header.data_bytes, 10);
        assert_eq!(header.bytes, file(json));
        assert_eq!(header.tensors[0].elements(), 1);
    }

    #[test]
    fn tensors_without_elements_may_share_a_place() {
        let json = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"e":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},
                       "f":{"dtype":"I8","shape":[0],"data_offsets":[4,4]},"g":{"dtype":"I8","shape":[0],"data_offsets":[4,4]}}"#;
        assert_eq!(Header::parse(&file(json)).unwrap().data_bytes, 4);
        assert_eq!(Header::parse(&file("{}")).unwrap().data_bytes, 0);
    }

    #[test]
    fn an_unknown_dtype_is_kept_and_sub_byte_types_need_whole_bytes() {
        let json = r#"{"q":{"dtype":"NF7","shape":[3],"data_offsets":[0,5]},"p":{"dtype":"F4","shape":[4],"data_offsets":[5,7]}}"#;
        assert_eq!(Header::parse(&file(json)).unwrap().tensors[0].dtype, Dtype::Other("NF7".into()));
        let odd = r#"{"p":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#;
        assert_eq!(
            refusal(odd),
            "header: tensor `p`: shape: 3 elements of F4 are 12 bits, expected whole bytes at line 1 column 53"
        );
    }

    #[test]
    fn errors_name_tensor_field_and_expectation() {
        let cases = [
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, "`a`: data_offsets: 4 bytes, expected 8"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, "`a`: data_offsets: ends at 0"),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                "`a`: data_offsets: begins at 4, expected 0 (hole)",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
                "`a`: shape: invalid value: integer `-1`, expected u64",
            ),
            (r#"{"a":{"dtype":"F32","shape":[1e99],"data_offsets":[0,4]}}"#, "`a`: shape: invalid type"),
            (
                r#"{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}}"#,
                "`a`: shape: invalid type",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}"#,
                "`a`: shape: [4294967296, 4294967296, 0]: expected a product below 2^64",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}"#,
                "`a`: shape: 4611686018427387904 elements of F32: expected below 2^64 bits",
            ),
            (r#"{"a":{"dtype":"F32","data_offsets":[0,4]}}"#, "`a`: missing field `shape`"),
            (r#"{"a":{"dtype":"F32","dtype":"F32"}}"#, "`a`: dtype comes twice"),
            (
                r#"{"a":{"dtype":3,"shape":[],"data_offsets":[0,4]}}"#,
                "`a`: dtype: invalid type: integer `3`, expected a string",
            ),
            (r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4,8]}}"#, "`a`: data_offsets:"),
            (r#"{"a":[]}"#, "`a`: invalid type: sequence, expected an object with dtype, shape and data_offsets"),
            (
                r#"{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}"#,
                "`a` comes twice",
            ),
            (r#"{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},"\u0061":{}}"#, "`a` comes twice"),
            (r#"{"__metadata__":{"k":1}}"#, "__metadata__: `k`: invalid type: integer `1`, expected a string"),
            (r#"{"__metadata__":{"k":"1","k":"2"}}"#, "__metadata__: `k` comes twice"),
            (r#"{"a":{"dtype":"?","shape":[0],"data_offsets":[0,3]}}"#, "`a`: data_offsets: 3 bytes, expected 0"),
            ("[]", "expected an object of tensors"),
            ("{} x", "trailing characters"),
            ("", "EOF"),
            (
                r#"{"a":{"dtype":"?","shape":[1],"data_offsets":[0,18446744073709551615]}}"#,
                "data section: 18446744073709551615 bytes",
            ),
        ];
        for (json, expected) in cases {
            let message = refusal(json);
            assert!(message.contains(expected), "{json}\n{message}\n{expected}");
        }
    }

    #[test]
    fn overlapping_tensors_are_refused() {
        let json = r#"{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[3],"data_offsets":[2,5]}}"#;
        assert_eq!(refusal(json), "tensor `b`: data_offsets: begins at 2, expected 4 (overlap)");
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_crash() {
        for open in ["[", r#"{"a":"#] {
            let skipped = format!(r#"{{"a":{{"extra":{}}}}}"#, open.repeat(100_000));
            Header::parse(&file(&skipped)).unwrap_err();
            Header::parse(&file(&open.repeat(100_000))).unwrap_err();
        }
    }

    #[test]
    fn a_length_field_is_checked_before_it_is_believed() {
        let read = |bytes: &[u8], length| Header::read_from(bytes, length).expect_err("refused").to_string();
        assert_eq!(read(&[1, 2], 2), "header length: needs 8 bytes, the file has 2 there");
        assert_eq!(
            read(&u64::MAX.to_le_bytes(), 8),
            "header length: 18446744073709551615 bytes, expected at most 100000000"
        );
        assert_eq!(read(&99_000_000u64.to_le_bytes(), 10), "header: needs 99000000 bytes, the file has 2 there");
        let bytes = file(r#"{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}"#);
        let whole = bytes.len() as u64 + 4;
        assert_eq!(Header::read_from(&bytes[..], whole).unwrap().file_bytes(), whole);
        let message = read(&bytes, whole + 1);
        assert_eq!(
            message,
            format!("file length: {} bytes, expected {whole} (header {}, data 4)", whole + 1, whole - 4)
        );
        Header::parse(&bytes[..bytes.len() - 1]).unwrap_err();
    }

    proptest! {
        #[test]
        fn any_tiling_in_any_order_is_read_back(
            lengths in prop::collection::vec(0u64..50, 0..20),
            order in any::<prop::sample::Index>(),
        ) {
            let mut entries = Vec::new();
            let mut begin = 0;
            for (index, &length) in lengths.iter().enumerate() {
                let end = begin + length;
                entries.push(format!(r#""t{index}":{{"dtype":"U8","shape":[{length}],"data_offsets":[{begin},{end}]}}"#));
                begin = end;
            }
            if !entries.is_empty() {
                let turn = order.index(entries.len());
                entries.rotate_left(turn);
            }
            let header = Header::parse(&file(&format!("{{{}}}", entries.join(",")))).unwrap();
            prop_assert_eq!(header.data_bytes, begin);
            prop_assert_eq!(header.tensors.len(), lengths.len());
            let mut end = 0;
            for tensor in &header.tensors {
                prop_assert_eq!(tensor.offset_bytes, end);
                end += tensor.length_bytes;
            }
        }

        #[test]
        fn no_bytes_make_the_parser_panic(json in "[\\[\\]{}\",:0-9a-f_]{0,200}", raw in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Header::parse(&file(&json));
            let _ = Header::parse(&raw);
            let _ = Header::read_from(&raw[..], raw.len() as u64);
        }

        #[test]
        fn a_changed_byte_is_refused_or_still_tiles(position in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = file(r#"{"a":{"dtype":"F16","shape":[3,2],"data_offsets":[0,12]},"b":{"dtype":"I8","shape":[1],"data_offsets":[12,13]}}"#);
            let index = position.index(bytes.len());
            bytes[index] = byte;
            if let Ok(header) = Header::parse(&bytes) {
                let total: u64 = header.tensors.iter().map(|tensor| tensor.length_bytes).sum();
                prop_assert_eq!(total, header.data_bytes);
            }
        }
    }
}
