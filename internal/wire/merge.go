package wire

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Strategy says how new metadata meets what is there.
type Strategy string

// The strategies of the wire protocol. An empty Strategy is StrategyReplace.
const (
	StrategyReplace   Strategy = "replace"
	StrategyMerge     Strategy = "merge"     // key by key
	StrategyDeepMerge Strategy = "deepMerge" // key by key, in nested objects too
)

// MaxMergeDepth is how many levels of nested objects a StrategyDeepMerge goes
// down before it gives up with ErrTooDeep.
const MaxMergeDepth = 64

// ErrStrategy says that a strategy is none of the three.
var ErrStrategy = errors.New("unknown metadata strategy")

// MergeMetadata returns what becomes of the metadata current, nil if there is
// none, when change is set under strategy. Both merges fall back to replacing
// where either side is not an object; within an object arrays and everything
// else that is not an object is replaced, and null is a value like others.
// Keys keep their order and values their bytes. Neither argument is changed;
// the result may share memory with them.
//
// It fails with ErrStrategy, with ErrNotJSON if change is not JSON, or with
// ErrTooDeep. A current that is not JSON is replaced.
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
		return trimSpace(change), nil
	}
	return mergeObjects(nil, current, change, levels, strategy == StrategyDeepMerge)
}

// field is one member of an object: slices of the text it was read from.
type field struct{ key, value []byte }

// mergeObjects appends to dst the object a with the members of b put over
// its own. It goes levels deep where deep is set.
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
	dst = append(dst, '{')
	for i, f := range fields {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, f.key...)
		dst = append(dst, ':')
		dst = append(dst, f.value...)
	}
	return append(dst, '}'), nil
}

// parseObject returns an object's members in order, and where each name
// stands. As in JavaScript, of equal names the last value counts, in the
// first one's place.
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
