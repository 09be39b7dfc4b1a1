package encode

import (
	"encoding"
	"encoding/json"
	"reflect"
	"strings"
	"sync"
	"time"
)

// isPlain reports whether v encodes to JSON without calls of the app's methods. It may
// return false for a value that does.
func isPlain(v any) bool { return plainValue(v, 0) }

// plainDepth limits how deep plainValue looks into nested maps and lists of any.
const plainDepth = 16

func plainValue(v any, depth int) bool {
	switch v := v.(type) {
	case nil:
		return true
	case map[string]any:
		for _, member := range v {
			if depth >= plainDepth || !plainValue(member, depth+1) {
				return false
			}
		}
		return true
	case []any:
		for _, element := range v {
			if depth >= plainDepth || !plainValue(element, depth+1) {
				return false
			}
		}
		return true
	}
	return plainType(reflect.TypeOf(v))
}

// plainTypes caches the results of plainType.
var plainTypes sync.Map // reflect.Type to bool

// plainType reports whether all values of a type are plain.
func plainType(t reflect.Type) bool {
	if known, ok := plainTypes.Load(t); ok {
		return known.(bool)
	}
	plain := plainParts(t, make(map[reflect.Type]bool))
	plainTypes.Store(t, plain)
	return plain
}

// safeTypes lists types whose methods for encoding are not the app's.
var safeTypes = map[reflect.Type]bool{
	reflect.TypeFor[time.Time](): true, reflect.TypeFor[json.RawMessage](): true, reflect.TypeFor[json.Number](): true,
}

// plainParts is plainType without the cache. within holds the types that contain t.
func plainParts(t reflect.Type, within map[reflect.Type]bool) bool {
	if within[t] || safeTypes[t] {
		return true
	}
	within[t] = true
	if hasMethods(t) || hasMethods(reflect.PointerTo(t)) {
		return false
	}
	switch t.Kind() {
	case reflect.Interface:
		return false
	case reflect.Pointer:
		return plainParts(t.Elem(), within)
	case reflect.Slice, reflect.Array:
		return plainParts(t.Elem(), within)
	case reflect.Map:
		return plainParts(t.Key(), within) && plainParts(t.Elem(), within)
	case reflect.Struct:
		for i := range t.NumField() {
			if f := t.Field(i); !plainParts(f.Type, within) || asksIsZero(f) {
				return false
			}
		}
	}
	return true
}

func hasMethods(t reflect.Type) bool {
	return t.Implements(reflect.TypeFor[json.Marshaler]()) || t.Implements(reflect.TypeFor[encoding.TextMarshaler]())
}

// asksIsZero reports whether encoding/json calls the method IsZero of the field.
func asksIsZero(f reflect.StructField) bool {
	zeroer := reflect.TypeFor[interface{ IsZero() bool }]()
	has := f.Type.Implements(zeroer) || reflect.PointerTo(f.Type).Implements(zeroer)
	return has && !safeTypes[f.Type] && strings.Contains(f.Tag.Get("json"), ",omitzero")
}
