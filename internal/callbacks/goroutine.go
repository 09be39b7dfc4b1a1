package callbacks

import "runtime"

// goroutineID returns the number of the calling goroutine, from the first line of its
// stack trace: "goroutine 17 [running]:". Go offers no other way to learn that Shutdown
// was called inside a callback for which it would wait.
func goroutineID() (id uint64) {
	var buf [40]byte
	line := buf[:runtime.Stack(buf[:], false)]
	for _, c := range line[len("goroutine "):] {
		if c < '0' || c > '9' {
			break
		}
		id = 10*id + uint64(c-'0')
	}
	return id
}
