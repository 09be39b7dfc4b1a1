// Package wire is the presence part of the Mesh wire protocol: the names of the
// commands, the codes of errors, the payloads, and the frames. It decodes requests and
// encodes answers, and knows nothing of sockets, rooms or Redis.
//
// JSON of users (states, metadata) keeps the bytes that they sent. It is validated, but
// never decoded and encoded again, so numbers keep their digits and objects their
// order.
package wire
