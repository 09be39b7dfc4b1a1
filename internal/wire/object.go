package wire

import "iter"

// Object is a JSON object. Its fields keep their order, the spelling of their names and
// the bytes of their values. Of equal names the last value counts, in the place of the
// first.
type Object struct {
	fields []field // value nil: removed
	index  map[string]int
	size   int // fields that are not removed
}

// ParseObject returns the fields of data: an object in valid JSON, or nil, which has
// none. The Object shares memory with data.
func ParseObject(data []byte) Object {
	if data == nil {
		return Object{}
	}
	fields, index := parseObject(data)
	return Object{fields: fields, index: index, size: len(fields)}
}

// Len returns the number of fields.
func (o *Object) Len() int { return o.size }

// Names yields the names of the fields. The caller may remove them during the iteration.
func (o *Object) Names() iter.Seq[string] {
	return func(yield func(string) bool) {
		for i := range o.fields {
			if f := &o.fields[i]; f.value != nil && !yield(string(unquoted(f.key))) {
				return
			}
		}
	}
}

// Remove removes a field. It does nothing if there is none of that name.
func (o *Object) Remove(name string) {
	if i, ok := o.index[name]; ok && o.fields[i].value != nil {
		o.fields[i].value = nil
		o.size--
	}
}

// Patch merges the fields of patch into the object: null removes a field, and any other
// value sets it, also if it contains null. A new field comes last. Patch returns the names
// in patch, with true for those that were set.
func (o *Object) Patch(patch Object) map[string]bool {
	named := make(map[string]bool, len(patch.fields))
	if o.index == nil {
		o.index = make(map[string]int, len(patch.fields))
	}
	for _, f := range patch.fields {
		name := string(unquoted(f.key))
		if named[name] = f.value[0] != 'n'; !named[name] {
			o.Remove(name)
			continue
		}
		i, ok := o.index[name]
		if !ok {
			i = len(o.fields)
			o.index[name] = i
			o.fields = append(o.fields, field{key: f.key})
		}
		if o.fields[i].value == nil {
			o.size++
		}
		o.fields[i].value = f.value
	}
	return named
}

// JSON returns the text of the object, without space between the fields. It returns nil
// if there are no fields.
func (o *Object) JSON() []byte {
	if o.size == 0 {
		return nil
	}
	size := 1
	for _, f := range o.fields {
		size += len(f.key) + len(f.value) + 2
	}
	return appendFields(make([]byte, 0, size), o.fields)
}

// appendFields appends an object with the fields that have a value.
func appendFields(dst []byte, fields []field) []byte {
	dst = append(dst, '{')
	empty := len(dst)
	for _, f := range fields {
		if f.value == nil {
			continue
		}
		if len(dst) > empty {
			dst = append(dst, ',')
		}
		dst = append(append(dst, f.key...), ':')
		dst = append(dst, f.value...)
	}
	return append(dst, '}')
}
