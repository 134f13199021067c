//! The index of a sharded checkpoint: which file holds which tensor (`model.safetensors.index.json`).

use std::collections::BTreeSet;

use serde::Deserialize;

use super::{MAX_HEADER_BYTES, SafetensorsError};

/// Contents of an index JSON, checked for what this crate uses: where each tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardIndex {
    /// Tensor name and the file that holds it, in the order of the file.
    pub weight_map: Vec<(String, String)>,
    /// `metadata.total_size`: the sum of the tensors' bytes as the writer counted them, when given as an integer.
    pub total_bytes: Option<u64>,
}

impl ShardIndex {
    /// Reads an index.
    ///
    /// # Errors
    /// When it is not JSON with a `weight_map` from tensor names to plain file names, or a tensor comes twice.
    pub fn parse(bytes: &[u8]) -> Result<Self, SafetensorsError> {
        if bytes.len() as u64 > MAX_HEADER_BYTES {
            let length = bytes.len() as u64;
            return Err(SafetensorsError::TooLong { field: "index", length, limit: MAX_HEADER_BYTES });
        }
        let raw: RawIndex =
            serde_json::from_slice(bytes).map_err(|source| SafetensorsError::Json { what: "index", source })?;
        for (tensor, shard) in &raw.weight_map.0 {
            if !is_plain_file_name(shard) {
                return Err(SafetensorsError::ShardName { tensor: tensor.clone(), shard: shard.clone() });
            }
        }
        let total_bytes = raw.metadata.and_then(|metadata| metadata.get("total_size")?.as_u64());
        Ok(Self { weight_map: raw.weight_map.0, total_bytes })
    }

    /// The files that the index names, each once, in the order of their names.
    pub fn shards(&self) -> Vec<&str> {
        let names: BTreeSet<&str> = self.weight_map.iter().map(|(_, shard)| shard.as_str()).collect();
        names.into_iter().collect()
    }
}

/// A name that stays in its directory.
fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

#[derive(Deserialize)]
#[serde(expecting = "an object with a weight_map")]
struct RawIndex {
    weight_map: super::header::StringMap,
    metadata: Option<serde_json::Map<String, serde_json::Value>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_each_shard_once() {
        let json = br#"{"metadata":{"total_size":12.0},"weight_map":{"b":"m-2.safetensors","a":"m-1.safetensors","c":"m-2.safetensors"}}"#;
        let index = ShardIndex::parse(json).unwrap();
        assert_eq!(index.shards(), ["m-1.safetensors", "m-2.safetensors"]);
        assert_eq!(index.weight_map[0], ("b".to_owned(), "m-2.safetensors".to_owned()));
        assert_eq!(index.total_bytes, None); // 12.0 is no integer: some writers do that, and nothing depends on it
    }

    #[test]
    fn a_shard_outside_the_directory_is_refused() {
        for name in ["../x", "/x", "a/b", "", "..", "."] {
            let json = format!(r#"{{"weight_map":{{"t":"{name}"}}}}"#);
            let message = ShardIndex::parse(json.as_bytes()).unwrap_err().to_string();
            assert!(message.contains("tensor `t`: shard `"), "{message}");
        }
    }

    #[test]
    fn an_index_without_a_weight_map_is_refused() {
        for json in ["{}", "[]", "", r#"{"weight_map":{"a":1}}"#, r#"{"weight_map":{"a":"x","a":"y"}}"#] {
            ShardIndex::parse(json.as_bytes()).unwrap_err();
        }
    }
}
