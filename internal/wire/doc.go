// Package wire is the Mesh wire protocol, presence part: the names of its
// commands, the shapes of its payloads, and the frames that carry them. It
// turns text into requests and answers into text, and knows nothing of
// sockets, rooms or Redis.
//
// JSON that users made (states, metadata) is carried as the bytes they sent:
// it is checked, never decoded and encoded again, so numbers keep their
// digits and objects their order.
package wire
