package wire

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Strategy is the way in which new metadata is combined with the metadata before it.
type Strategy string

// The strategies of the wire protocol. An empty Strategy is StrategyReplace.
const (
	StrategyReplace   Strategy = "replace"
	StrategyMerge     Strategy = "merge"     // key by key
	StrategyDeepMerge Strategy = "deepMerge" // key by key, also in nested objects
)

// MaxMergeDepth limits the levels of nested objects that a StrategyDeepMerge enters. If
// there are more, it fails with ErrTooDeep.
const MaxMergeDepth = 64

// ErrStrategy means that a strategy is unknown.
var ErrStrategy = errors.New("unknown metadata strategy")

// MergeMetadata returns the metadata that results from current (nil: none) and change
// under strategy. If one of them is not an object, both merges replace the whole.
// Within an object, arrays and all other values that are not objects are replaced, and
// null is an ordinary value. Keys keep their order and values keep their bytes. The
// arguments are not changed; the result may share memory with them.
//
// It fails with ErrStrategy, with ErrNotJSON if change is not JSON, or with ErrTooDeep.
// If current is not JSON it is replaced.
func MergeMetadata(current, change json.RawMessage, strategy Strategy) (json.RawMessage, error) {
	switch strategy {
	case "", StrategyReplace, StrategyMerge, StrategyDeepMerge:
	default:
		return nil, fmt.Errorf("%w %s", ErrStrategy, Quote(string(strategy)))
	}
	if err := CheckValue(change); err != nil {
		return nil, err
	}
	levels := 0
	switch strategy {
	case StrategyMerge:
		levels = 1
	case StrategyDeepMerge:
		levels = MaxMergeDepth
	}
	if levels == 0 || !IsObject(change) || !IsObject(current) || CheckValue(current) != nil {
		return trimSpace(change), nil //nolint:nilerr // a value that does not merge is replaced
	}
	return mergeObjects(nil, current, change, levels, strategy == StrategyDeepMerge)
}

// field is one field of an object: slices of the original text.
type field struct{ key, value []byte }

// mergeObjects appends to dst the object a with the fields of b merged in. If deep is
// set it enters at most levels levels.
func mergeObjects(dst, a, b []byte, levels int, deep bool) ([]byte, error) {
	if levels == 0 {
		return nil, ErrTooDeep
	}
	fields, index := parseObject(a)
	over, _ := parseObject(b)
	for _, f := range over {
		i, ok := index[string(unquoted(f.key))]
		switch {
		case !ok:
			fields = append(fields, f)
		case deep && IsObject(f.value) && IsObject(fields[i].value):
			merged, err := mergeObjects(nil, fields[i].value, f.value, levels-1, deep)
			if err != nil {
				return nil, err
			}
			fields[i].value = merged
		default:
			fields[i].value = f.value
		}
	}
	return appendFields(dst, fields), nil
}

// parseObject returns the fields of an object in order, and the index of each name. As
// in JavaScript, the last value of equal names counts, in the place of the first.
func parseObject(obj []byte) ([]field, map[string]int) {
	var fields []field
	index := make(map[string]int)
	for key, value := range members(obj) {
		name := string(unquoted(key))
		if i, ok := index[name]; ok {
			fields[i].value = value
			continue
		}
		index[name] = len(fields)
		fields = append(fields, field{key, value})
	}
	return fields, index
}
